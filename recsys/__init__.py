"""What a recommender is: schema, datasets, towers, losses and metrics on TensorFlow and TFRS."""

import os

# TFRS 0.7 refuses Keras 3; TensorFlow reads the switch at the first touch of tf.keras.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
# The C++ start-up chatter of TensorFlow says nothing that a person running a job can act on.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__version__ = "0.1.0"
