"""How a recommender leaves: index, SavedModel, registry, batch scoring, hand-off."""
