"""How the second stage multiplies features with each other: cross layers, or dot products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf
import tensorflow_recommenders as tfrs

from recsys.ranking_config import Ranking


class CrossLayers(tf.keras.layers.Layer):
    """The cross layers of DCN-v2, of full or low rank (Wang et al., "DCN V2", WWW 2021).

    What comes out goes on to hidden layers: the stacked structure of the paper.

    Args:
        config: its `cross_layers` and `cross_rank`.
    """

    def __init__(self, config: Ranking) -> None:
        super().__init__()
        cross = tfrs.layers.feature_interaction.Cross
        self._layers = [cross(projection_dim=config.cross_rank) for _ in range(config.cross_layers)]

    def call(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        """Cross all columns of `[batch, candidates, any]` each; what comes out has as many."""
        crossed = inputs = tf.concat(parts, axis=-1)
        for layer in self._layers:
            crossed = layer(inputs, crossed)
        return crossed


class DotProducts(tf.keras.layers.Layer):
    """The interaction of DLRM: a dot product for each pair of features.

    Numbers become one vector by the bottom layers; it is multiplied as the others are, and stands
    beside the products in what goes on to the top layers (Naumov et al., "Deep Learning
    Recommendation Model for Personalization and Recommendation Systems", 2019). There all vectors
    have one size; here those of features have the size of what they are, so each is projected.

    Args:
        config: its `bottom` are units of the bottom layers; the last is the size of the vectors.
    """

    def __init__(self, config: Ranking) -> None:
        super().__init__()
        self._bottom = [tf.keras.layers.Dense(units, "gelu") for units in config.bottom]
        self._size = config.bottom[-1]
        self._projections: list[tf.keras.layers.Layer] = []
        # Zeros in place of what is above the diagonal: a gather would take longer than they do.
        self._products = tfrs.layers.feature_interaction.DotInteraction(skip_gather=True)

    def build(self, input_shape: Sequence[tf.TensorShape]) -> None:
        """Make a projection for each vector."""
        dense = tf.keras.layers.Dense
        self._projections = [dense(self._size, use_bias=False) for _ in input_shape[1:]]
        super().build(input_shape)

    def call(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        """Give the vector of the numbers and all products, `[batch, candidates, any]`.

        Args:
            parts: `[batch, candidates, any]` each: numbers, then the vector of each feature.
        """
        numbers, *vectors = parts
        for layer in self._bottom:
            numbers = layer(numbers)
        projected = [p(v) for p, v in zip(self._projections, vectors, strict=True)]
        flat = [tf.reshape(v, [-1, self._size]) for v in (numbers, *projected)]
        shape = tf.concat([tf.shape(numbers)[:-1], [len(flat) ** 2]], axis=0)
        # At about 1 each, however long the vectors are.
        products = tf.reshape(self._products(flat), shape) / self._size**0.5
        return tf.concat([numbers, products], axis=-1)


#: By `ranking.interaction`.
INTERACTIONS: dict[str, Callable[[Ranking], tf.keras.layers.Layer]] = {
    "cross": CrossLayers,
    "dot": DotProducts,
}
