"""What a history says of one candidate: attention whose query is the candidate itself."""

from __future__ import annotations

import tensorflow as tf


class TargetAttention(tf.keras.layers.Layer):
    """Sum of the events of a history, each weighed by what it has to do with the candidate.

    The activation unit of DIN (Zhou et al., "Deep Interest Network for Click-Through Rate
    Prediction", KDD 2018): a small network over event, candidate and their product. Weights are not
    normalised, so that a history full of what the candidate is like says more than a single event.

    Args:
        units: hidden units of the activation unit.
    """

    def __init__(self, units: int) -> None:
        super().__init__()
        dense = tf.keras.layers.Dense
        # One layer over the three of them, written so that no input is repeated for every pair.
        self._event = dense(units)
        self._candidate = dense(units, use_bias=False)
        self._product = dense(units, use_bias=False)
        self._same = dense(units, use_bias=False)
        self._weight = dense(1)

    def call(
        self, candidates: tf.Tensor, events: tf.Tensor, same: tf.Tensor, known: tf.Tensor
    ) -> tf.Tensor:
        """Attend to a history for each candidate.

        Args:
            candidates: `[batch, candidates, dim]`.
            events: `[batch, length, dim]`.
            same: `[batch, candidates, length]`, 1 where the event is of the candidate itself.
            known: bool `[batch, length]`, which places of the history hold an event.

        Returns:
            `[batch, candidates, dim]`, zeros for an empty history.
        """
        product = candidates[:, :, tf.newaxis] * events[:, tf.newaxis]
        hidden = self._product(product) + self._same(same[..., tf.newaxis])
        hidden += self._event(events)[:, tf.newaxis] + self._candidate(candidates)[:, :, tf.newaxis]
        weights = tf.squeeze(self._weight(tf.nn.relu(hidden)), axis=-1)
        weights = tf.where(known[:, tf.newaxis], weights, 0.0)
        return tf.einsum("bcl,bld->bcd", weights, events)
