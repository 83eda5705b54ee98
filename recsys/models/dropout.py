"""Dropout that a resumed training repeats exactly."""

from __future__ import annotations

import tensorflow as tf


class StatelessDropout:
    """Dropout whose mask depends on a seed, the training step and the replica alone.

    A training that resumes from a checkpoint draws the masks that an undisturbed one would draw.
    It has no weights, so it is no Keras layer that a SavedModel would have to keep.
    """

    def __init__(self, rate: float, seed: int, step: tf.Variable) -> None:
        self._rate = rate
        self._seed = seed
        self._step = step

    def __call__(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Drop elements of `inputs`, any shape, while training."""
        if not training or not self._rate:
            return inputs
        return tf.nn.experimental.stateless_dropout(inputs, self._rate, seed=self._now())

    def dropped(self, shape: tf.Tensor, training: bool) -> tf.Tensor:
        """Draw which of the places of `shape` are dropped, a bool tensor; none when serving."""
        if not training or not self._rate:
            return tf.zeros(shape, tf.bool)
        return tf.random.stateless_uniform(shape, self._now()) < self._rate

    def _now(self) -> tf.Tensor:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        # Seeds lie below 2**32: no replica repeats the masks of another.
        seed = tf.bitwise.left_shift(tf.cast(replica, tf.int64), 32) + self._seed
        return tf.stack([seed, self._step])


class Dropouts:
    """Makes dropout layers, a seed for each: equal seeds would drop the same units everywhere."""

    def __init__(self, rate: float, seed: int, step: tf.Variable) -> None:
        self._rate = rate
        self._seed = seed
        self._step = step

    def __call__(self, rate: float | None = None) -> StatelessDropout:
        """Make the next one, of the common rate unless told otherwise."""
        self._seed += 1
        return StatelessDropout(self._rate if rate is None else rate, self._seed, self._step)
