"""What it adds to an item's score that the query has seen it."""

from __future__ import annotations

import tensorflow as tf


class RepeatScores(tf.keras.layers.Layer):
    """A score for each event of a history, added to its item where that is a candidate again.

    A dot product of vectors cannot list what was seen above all else: among many items some lie as
    close by chance. So seen items get a score of their own, as in RepeatNet (Ren et al., AAAI
    2019), which depends on how many events came later and on the event itself, such as its type.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._salience = tf.keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")

    def build(self, input_shape: tf.TensorShape) -> None:
        """Create the scores by recency, `[length]`."""
        self._recency = self.add_weight("recency", [self._length], initializer="zeros")

    def call(self, events: tf.Tensor, sequence: tf.Tensor, known: tf.Tensor) -> tf.Tensor:
        """Score the events that each query knows.

        Args:
            events: `[sequences, length, dim]`.
            sequence: int32 `[batch]`, history of each query.
            known: int32 `[batch]`, how many events are before the query.

        Returns:
            `[batch, length]`, in units of the dot product; 0 for events that are not known.
        """
        later = known[:, tf.newaxis] - 1 - tf.range(tf.shape(events)[1])
        scores = tf.gather(self._recency, tf.maximum(later, 0))
        scores += tf.gather(tf.squeeze(self._salience(events), axis=-1), sequence)
        return tf.where(later >= 0, scores, 0.0)
