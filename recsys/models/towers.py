"""Query and candidate towers, and the two as one exportable module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.features import FeatureEmbedding, FeatureEncoder, masked_mean, raw_signature
from recsys.model_config import TwoTowerConfig
from recsys.models.dropout import Dropouts, StatelessDropout
from recsys.models.encoders import history_encoder
from recsys.models.precision import mixed_precision
from recsys.models.repeats import RepeatScores
from recsys.schema import Schema

#: What an id that no vocabulary holds is encoded as: the first bucket after 0, a missing value.
_UNKNOWN = tf.constant(1, tf.int64)


class ItemEmbedding(tf.keras.layers.Layer):
    """Embed items: the id's own vector plus a projection of the item's other features.

    The sum keeps an item whose id is unknown close to items that look like it. While training, ids
    are dropped at random, so that the features learn to stand alone and the vector of unknown ids
    learns what to add to them.

    With `config.num_neighbours` the mean of the neighbours' ids' vectors is added, times a learned
    gain: a convolution that has no other weight (as in LightGCN, He et al., SIGIR 2020) over the
    graph of visits (as in GCE-GNN, Wang et al., SIGIR 2020). A dropped id has no neighbours, as a
    new item has none.

    Args:
        schema: of the run.
        embedding: tables.
        config: of the model.
        known: encoded features of the items of the id's vocabulary, `[vocabulary, ...]` by name,
            which histories list.
        id_dropouts: drop ids of candidates, and of histories.
    """

    def __init__(
        self,
        schema: Schema,
        embedding: FeatureEmbedding,
        config: TwoTowerConfig,
        known: Mapping[str, tf.Tensor],
        id_dropouts: tuple[StatelessDropout, StatelessDropout],
    ) -> None:
        super().__init__()
        self._id = next(f for f in schema.candidate if f.source_column == "item")
        self._others = tuple(f for f in schema.candidate if f.name != self._id.name)
        self._embedding = embedding
        self._side = tf.keras.layers.Dense(config.embedding_dim) if self._others else None
        self._known = {
            f.name: tf.Variable(known[f.name], trainable=False, name=f"known_{f.name}")
            for f in self._others
        }
        self._candidate_dropout, self._history_dropout = id_dropouts
        self._neighbours = None
        if config.num_neighbours:
            # A GPU holds and reads rows of int64, not of int32.
            none = tf.zeros([embedding.rows(self._id), config.num_neighbours], tf.int64)
            self._neighbours = tf.Variable(none, trainable=False, name="neighbours")
            self._gain = self.add_weight("neighbour_gain", [], initializer="ones")

    def connect(self, neighbours: NDArray[np.int64]) -> None:
        """Set the neighbours of all ids.

        Args:
            neighbours: rows of the id's vocabulary, `[vocabulary, num_neighbours]`, 0 for none.

        Raises:
            ValueError: the config has no neighbours.
        """
        if self._neighbours is None:
            raise ValueError("model.num_neighbours is 0: there is nothing to connect")
        self._neighbours.assign(neighbours)

    @property
    def tables(self) -> list[tf.Variable]:
        """Tables of ids and of other values of items."""
        return self._embedding.tables([self._id, *self._others])

    def call(self, encoded: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Embed encoded candidate features, `[batch, dim]`."""
        dropped = self._candidate_dropout.dropped(tf.shape(encoded[self._id.name]), training)
        return self._embed(encoded, dropped)

    def _embed(self, encoded: Mapping[str, tf.Tensor], dropped: tf.Tensor) -> tf.Tensor:
        ids = encoded[self._id.name]
        ids = tf.where(dropped, tf.minimum(ids, _UNKNOWN), ids)
        output = self._vectors(ids)
        if self._neighbours is not None:
            output += self._gain * self._near(ids)
        if self._side is not None:
            output += self._side(self._embedding(self._others, encoded))
        return output

    def _vectors(self, ids: tf.Tensor) -> tf.Tensor:
        """Embed ids alone, `[any]` to `[any, dim]`."""
        return self._embedding([self._id], {self._id.name: ids})

    def _near(self, ids: tf.Tensor) -> tf.Tensor:
        """Mean of the neighbours' vectors, `[batch, dim]`."""
        # Histories list an item often, and items share neighbours: each row is read, and has its
        # gradient sent, once.
        once, place = tf.unique(ids)
        near = tf.nn.embedding_lookup(self._neighbours, once)
        rows, place_of_near = tf.unique(tf.reshape(near, [-1]))
        vectors = tf.gather(self._vectors(rows), tf.reshape(place_of_near, tf.shape(near)))
        return tf.gather(masked_mean(vectors, near > 0), place)

    def history(self, ids: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Embed the encoded ids of a history: `[batch, length]` to `[batch, length, dim]`."""
        flat = tf.reshape(ids, [-1])
        # Unlike `tf.gather` it keeps the order of rows that are divided over parameter servers.
        lookup = tf.nn.embedding_lookup
        encoded = {name: lookup(values, flat) for name, values in self._known.items()}
        dropped = self._history_dropout.dropped(tf.shape(flat), training)
        output = self._embed(encoded | {self._id.name: flat}, dropped)
        return tf.reshape(output, [-1, tf.shape(ids)[1], output.shape[-1]])


class QueryTower(tf.keras.layers.Layer):
    """Embed who asks, from the history and the other query and context features."""

    def __init__(
        self,
        schema: Schema,
        embedding: FeatureEmbedding,
        items: ItemEmbedding,
        config: TwoTowerConfig,
        dropouts: Dropouts,
        repeats: bool,
    ) -> None:
        super().__init__()
        dim = config.embedding_dim
        self._item_histories = schema.item_histories
        self._other_histories = tuple(
            f for f in schema.histories() if f not in self._item_histories
        )
        self._others = tuple(f for f in schema.query if f.kind != "history")
        self._embedding = embedding
        self._items = items
        self._normalize = config.loss.normalize
        dense = tf.keras.layers.Dense
        self._events = {f.name: dense(dim, use_bias=False) for f in self._other_histories}
        self._repeats = RepeatScores(schema.history_length) if repeats else None
        with mixed_precision(config.mixed_precision):
            self._encoder = history_encoder(config.history, dim, schema.history_length, dropouts)
            self._layers = [dense(units, "gelu") for units in config.hidden]
            if self._others or self._layers:
                self._layers.append(dense(dim))
        self._dropouts = [dropouts() for _ in self._layers]

    @property
    def items(self) -> ItemEmbedding:
        """What embeds the items that histories list."""
        return self._items

    def call(
        self, encoded: Mapping[str, tf.Tensor], training: bool = False
    ) -> dict[str, tf.Tensor]:
        """Embed queries.

        Args:
            encoded: query features, `[batch, ...]`. Where queries share histories, histories are
                `[sequences, length]`, and `sequence` and `known`, int32 `[batch]`, say which
                history a query has and how many of its events are before the query.
            training: whether to drop units.

        Returns:
            `embedding` `[batch, embedding_dim]` and, if the tower has them, `repeat`
            `[batch, length]`: what is added to the scores of the items in the history.
        """
        outputs = {}
        parts = [self._embedding(self._others, encoded)] if self._others else []
        states = []
        if self._item_histories or self._other_histories:
            events = self._event_vectors(encoded, training)
            if "known" in encoded:
                sequence, known = encoded["sequence"], encoded["known"]
            else:
                known = self._num_events(encoded)
                sequence = tf.range(tf.shape(known)[0])
            states = [self._state(events, sequence, known, training)]
            if self._repeats is not None:
                outputs["repeat"] = self._repeats(events, sequence, known)
        # What is learned of all parts says how the query differs from its history alone.
        learned = [self._combine([*states, *parts], training)] if self._layers else []
        output = tf.add_n([*states, *learned])
        normal = tf.math.l2_normalize(output, axis=-1) if self._normalize else output
        return outputs | {"embedding": normal}

    def _combine(self, parts: Sequence[tf.Tensor], training: bool) -> tf.Tensor:
        hidden = tf.concat(parts, axis=-1)
        for layer, dropout in zip(self._layers, self._dropouts, strict=True):
            hidden = layer(dropout(hidden, training=training))
        return tf.cast(hidden, tf.float32)

    def _state(
        self, events: tf.Tensor, sequence: tf.Tensor, known: tf.Tensor, training: bool
    ) -> tf.Tensor:
        """State of each query's history, `[batch, embedding_dim]`; zeros for an empty one."""
        states = tf.cast(self._encoder(events, training=training), tf.float32)
        last = tf.maximum(known - 1, 0)
        state = tf.gather_nd(states, tf.stack([sequence, last], axis=1))
        return tf.where(known[:, tf.newaxis] > 0, state, 0.0)

    def _event_vectors(self, encoded: Mapping[str, tf.Tensor], training: bool) -> tf.Tensor:
        vectors = [self._items.history(encoded[f.name], training) for f in self._item_histories]
        vectors += [
            self._events[f.name](self._embedding.sequence(f, encoded[f.name]))
            for f in self._other_histories
        ]
        return tf.add_n(vectors)

    def _num_events(self, encoded: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Number of events of each history, `[batch]`; a value within may be missing."""
        histories = [encoded[f.name] for f in (*self._item_histories, *self._other_histories)]
        present = tf.reduce_any(tf.stack([history > 0 for history in histories]), axis=0)
        place = tf.range(1, tf.shape(present)[1] + 1)
        return tf.reduce_max(tf.where(present, place, 0), axis=1)


class CandidateTower(tf.keras.layers.Layer):
    """Embed what is recommended."""

    def __init__(
        self, items: ItemEmbedding, config: TwoTowerConfig, dropout: StatelessDropout
    ) -> None:
        super().__init__()
        self._items = items
        self._dropout = dropout
        self._normalize = config.loss.normalize

    @property
    def items(self) -> ItemEmbedding:
        """What embeds the candidates."""
        return self._items

    @property
    def tables(self) -> list[tf.Variable]:
        """Tables that candidates have rows of."""
        return self._items.tables

    def call(self, encoded: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Embed encoded candidate features, `[batch, embedding_dim]`."""
        output = self._dropout(self._items(encoded, training=training), training=training)
        return tf.math.l2_normalize(output, axis=-1) if self._normalize else output


class Towers(tf.Module):
    """Both towers on raw features: what `fit` saves, and all that evaluation and export need.

    Args:
        schema: of the run.
        encoder: of raw features.
        query: embeds who asks.
        candidate: embeds what is recommended.
        head: of a joint training, from both embeddings to log odds.
    """

    def __init__(
        self,
        schema: Schema,
        encoder: FeatureEncoder,
        query: QueryTower,
        candidate: CandidateTower,
        head: tf.keras.layers.Layer | None = None,
    ) -> None:
        super().__init__()
        self._head = head
        self._schema = schema
        self._encoder = encoder
        self._query = query
        self._candidate = candidate

    def save(self, directory: Path) -> None:
        """Write a SavedModel with the signatures `embed_query` and `embed_candidate`.

        With a head also `log_odds`: `queries` `[batch, dim]` and `candidates` `[batch, any, dim]`,
        embeddings, to `log_odds` `[batch, any]`.
        """
        signatures = {
            "embed_query": self._signature(self._query, raw_signature(self._schema.query)),
            "embed_candidate": self._signature(
                self._candidate, raw_signature(self._schema.candidate)
            ),
        }
        if self._head is not None:
            signatures["log_odds"] = _log_odds(self._head)
        tf.saved_model.save(self, str(directory), signatures)

    def _signature(
        self, tower: tf.keras.layers.Layer, inputs: dict[str, tf.TensorSpec]
    ) -> tf.types.experimental.ConcreteFunction:
        def embed(**raw: tf.Tensor) -> dict[str, tf.Tensor]:
            outputs = tower(self._encoder(raw))
            return outputs if isinstance(outputs, dict) else {"embedding": outputs}

        return tf.function(embed).get_concrete_function(**inputs)


def _log_odds(head: tf.keras.layers.Layer) -> tf.types.experimental.ConcreteFunction:
    def log_odds(queries: tf.Tensor, candidates: tf.Tensor) -> dict[str, tf.Tensor]:
        wide = tf.broadcast_to(queries[:, tf.newaxis], tf.shape(candidates))
        return {"log_odds": head(wide, candidates)}

    return tf.function(log_odds).get_concrete_function(
        queries=tf.TensorSpec([None, head.dim], tf.float32, "queries"),
        candidates=tf.TensorSpec([None, None, head.dim], tf.float32, "candidates"),
    )
