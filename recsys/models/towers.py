"""Query and candidate towers, and the two as one exportable module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import tensorflow as tf

from recsys.config import TwoTowerConfig
from recsys.features import FeatureEmbedding, FeatureEncoder, raw_signature
from recsys.schema import Feature, Schema

_NUM_POOLS = 2


class StatelessDropout(tf.keras.layers.Layer):
    """Dropout whose mask depends on a seed and the training step alone.

    A training that resumes from a checkpoint draws the masks that an undisturbed one would draw.
    """

    def __init__(self, rate: float, seed: int, step: tf.Variable) -> None:
        super().__init__()
        self._rate = rate
        self._seed = seed
        self._step = step

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Drop elements of `inputs`, any shape, while training."""
        if not training or not self._rate:
            return inputs
        seed = tf.stack([tf.constant(self._seed, tf.int64), self._step])
        return tf.nn.experimental.stateless_dropout(inputs, self._rate, seed=seed)


class HistoryPool(tf.keras.layers.Layer):
    """Several weighted means of a history; each learns what an event's recency is worth.

    The weight of an event depends on how many events came after it, so that one pool can look at
    the last click alone and another at the whole session.
    """

    def build(self, input_shape: tf.TensorShape) -> None:
        """Create the weights by recency, `[num_pools, length]`."""
        length = input_shape[1]
        recency = tf.range(length, dtype=tf.float32)
        # One pool starts close to the last click, one close to the plain mean.
        decay = tf.reshape(tf.linspace(1.0, 0.0, _NUM_POOLS), [-1, 1])
        self._logits = self.add_weight(
            name="recency", shape=[_NUM_POOLS, length], initializer="zeros"
        )
        self._logits.assign(-decay * recency)

    def call(self, sequence: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """Pool `[batch, length, dim]` to `[batch, num_pools * dim]`; mask is `[batch, length]`.

        The valid positions come first, oldest event first; an empty history gives zeros.
        """
        mask = tf.cast(mask, tf.int32)
        later = tf.cumsum(mask, axis=1, exclusive=True, reverse=True)
        weights = tf.exp(tf.gather(self._logits, later, axis=1)) * tf.cast(mask, tf.float32)
        weights = tf.math.divide_no_nan(weights, tf.reduce_sum(weights, axis=-1, keepdims=True))
        pooled = tf.einsum("pbl,bld->bpd", weights, sequence)
        return tf.reshape(pooled, [-1, _NUM_POOLS * sequence.shape[-1]])


class QueryTower(tf.keras.layers.Layer):
    """Embed who asks, from the history and the other query and context features.

    The pooled items of the history are added to the output: before anything is learned, a query
    already lies close to the items it has seen, and the layers learn how it differs from them.
    """

    def __init__(
        self,
        schema: Schema,
        embedding: FeatureEmbedding,
        config: TwoTowerConfig,
        dropouts: Sequence[StatelessDropout],
    ) -> None:
        super().__init__()
        self._histories = tuple(schema.histories())
        self._others = tuple(f for f in schema.query if f.kind != "history")
        self._embedding = embedding
        self._pools = {f.name: HistoryPool(name=f"{f.name}_pool") for f in self._histories}
        self._hidden = [tf.keras.layers.Dense(units, "gelu") for units in config.hidden]
        self._output = tf.keras.layers.Dense(config.embedding_dim)
        self._dropouts = list(dropouts)
        self._normalize = config.loss.normalize
        average = tf.keras.initializers.Constant(1 / _NUM_POOLS)
        self._gains = {
            f.name: self.add_weight(f"{f.name}_gain", [_NUM_POOLS], initializer=average)
            for f in schema.item_histories
        }

    def call(self, encoded: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Embed encoded query features, `[batch, embedding_dim]`."""
        pooled = {feature.name: self._pool(feature, encoded) for feature in self._histories}
        parts = list(pooled.values())
        if self._others:
            parts.append(self._embedding(self._others, encoded))
        hidden = self._dropouts[0](tf.concat(parts, axis=-1), training=training)
        for layer, dropout in zip(self._hidden, self._dropouts[1:], strict=True):
            hidden = dropout(layer(hidden), training=training)
        output = self._output(hidden)
        for name, gain in self._gains.items():
            pools = tf.reshape(pooled[name], [-1, _NUM_POOLS, output.shape[-1]])
            output += tf.einsum("p,bpd->bd", gain, pools)
        return tf.math.l2_normalize(output, axis=-1) if self._normalize else output

    def _pool(self, feature: Feature, encoded: Mapping[str, tf.Tensor]) -> tf.Tensor:
        sequence = self._embedding.sequence(feature, encoded[feature.name])
        return self._pools[feature.name](sequence, mask=encoded[feature.name] > 0)


class CandidateTower(tf.keras.layers.Layer):
    """Embed items: the id's own vector plus a projection of its other features.

    The sum keeps an item whose id is unknown close to items that look like it.
    """

    def __init__(
        self,
        schema: Schema,
        embedding: FeatureEmbedding,
        config: TwoTowerConfig,
        dropout: StatelessDropout,
    ) -> None:
        super().__init__()
        self._id = next(f for f in schema.candidate if f.source_column == "item")
        self._others = tuple(f for f in schema.candidate if f.name != self._id.name)
        self._embedding = embedding
        self._side = tf.keras.layers.Dense(config.embedding_dim)
        self._dropout = dropout
        self._normalize = config.loss.normalize

    def call(self, encoded: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Embed encoded candidate features, `[batch, embedding_dim]`."""
        output = self._embedding([self._id], encoded)
        if self._others:
            output += self._side(self._embedding(self._others, encoded))
        output = self._dropout(output, training=training)
        return tf.math.l2_normalize(output, axis=-1) if self._normalize else output


class Towers(tf.Module):
    """Both towers on raw features: what `fit` saves, and all that evaluation and export need."""

    def __init__(
        self, schema: Schema, encoder: FeatureEncoder, query: QueryTower, candidate: CandidateTower
    ) -> None:
        super().__init__()
        self._schema = schema
        self._encoder = encoder
        self._query = query
        self._candidate = candidate

    def save(self, directory: Path) -> None:
        """Write a SavedModel with the signatures `embed_query` and `embed_candidate`."""
        signatures = {
            "embed_query": self._signature(self._query, raw_signature(self._schema.query)),
            "embed_candidate": self._signature(
                self._candidate, raw_signature(self._schema.candidate)
            ),
        }
        tf.saved_model.save(self, str(directory), signatures)

    def _signature(
        self, tower: tf.keras.layers.Layer, inputs: dict[str, tf.TensorSpec]
    ) -> tf.types.experimental.ConcreteFunction:
        def embed(**raw: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"embedding": tower(self._encoder(raw))}

        return tf.function(embed).get_concrete_function(**inputs)
