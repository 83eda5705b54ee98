"""Training side of the clickstream recommender: data preparation, models and evaluation."""
