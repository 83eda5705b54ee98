"""The second stage as a `tfrs.Model`: it orders what retrieval has found for a request.

Ids have no embeddings of their own here: the requests of one window are too few to learn them.
Items are the frozen vectors of the candidate tower by whose scores the ranker is trained, wherever
a vector is needed; a refit turns the space of the towers, so the ranker keeps these. What it reads
of the towers that serve is their scores alone, which a refit leaves comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs
from numpy.typing import NDArray

from recsys.calibration import Calibration
from recsys.features import FeatureEmbedding, FeatureEncoder, raw_signature
from recsys.models.dropout import Dropouts
from recsys.models.interactions import INTERACTIONS
from recsys.models.list_losses import ABSENT, LOSSES
from recsys.models.ranker_features import KnownItems, RankerFeatures
from recsys.models.target_attention import TargetAttention
from recsys.ranking_config import Ranking
from recsys.schema import Feature, Schema, as_shown

#: Score of what is no candidate.
_NONE = -1e9
#: Later ones count as the last of them.
_POSITIONS = 100


class Tower(tf.keras.layers.Layer):
    """Layers with GELU, and an output that begins as zeros: the first order is that of retrieval.

    Args:
        hidden: units of the layers.
        dropouts: maker of the dropout layers, one before each layer.
    """

    def __init__(self, hidden: Sequence[int], dropouts: Dropouts) -> None:
        super().__init__()
        dense = tf.keras.layers.Dense
        self._hidden = [dense(units, "gelu") for units in hidden]
        self._dropouts = [dropouts() for _ in range(len(hidden) + 1)]
        self._output = dense(1, kernel_initializer="zeros")

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Give `[..., 1]` of `[..., any]`."""
        for layer, dropout in zip(self._hidden, self._dropouts[1:], strict=True):
            inputs = layer(dropout(inputs, training=training))
        return self._output(self._dropouts[0](inputs, training=training))


class PositionBias(tf.keras.layers.Layer):
    """What a position adds to the log odds of whatever is shown there, over the first position.

    It is added to what the network says, and no part of what serves: it takes upon itself what the
    place explains, so that the network need not (the shallow tower of Zhao et al., "Recommending
    What Video to Watch Next", RecSys 2019). Positions that nothing tells (0) add nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._table = tf.keras.layers.Embedding(_POSITIONS, 1, "zeros")

    def call(self, positions: tf.Tensor) -> tf.Tensor:
        """Give float32 of int32, `[batch, candidates]` both."""
        place = tf.clip_by_value(positions, 1, _POSITIONS) - 1
        added = self._table(place) - self._table(tf.zeros_like(place))
        return tf.squeeze(added, axis=-1)


class RankingNetwork(tf.keras.layers.Layer):
    """DCN-v2 or DLRM over query, candidate and context features, with target attention to history.

    Features are multiplied with each other, see `recsys.models.interactions`; a head follows. A
    logit begins as the scaled score of retrieval: the ranker learns where to differ from it.

    Args:
        config: of the model.
        features: of requests and items.
        head: makes `[batch, candidates, outputs]` of what was crossed, `[batch, candidates, any]`.
        prior: `[outputs]` log odds of a candidate to be what is asked for, where logits begin.
    """

    def __init__(
        self,
        config: Ranking,
        features: RankerFeatures,
        head: tf.keras.layers.Layer,
        prior: NDArray[np.floating[Any]],
    ) -> None:
        super().__init__()
        # Behind a function: what it holds of every item is no weight.
        self._features: Callable[[], RankerFeatures] = lambda: features
        dense = tf.keras.layers.Dense
        self._embedding = FeatureEmbedding(
            features.schema, features.vocabulary_sizes, config.embedding_dim
        )
        length = max(features.schema.history_length, 1)
        self._recency = tf.keras.layers.Embedding(length, config.embedding_dim)
        self._item = dense(config.attention_dim)
        self._event = dense(config.attention_dim, use_bias=False)
        self._attention = TargetAttention(config.attention_dim)
        self._interaction = INTERACTIONS[config.interaction](config)
        self.head = head
        self._gain = self.add_weight("gain", prior.shape, initializer="ones")
        first = tf.keras.initializers.Constant(prior)
        self._prior = self.add_weight("prior", prior.shape, initializer=first)

    def call(self, encoded: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Log odds of the candidates, `[batch, candidates, outputs]`; -1e9 where there is none.

        Args:
            encoded: what `RankerFeatures` makes of a request; numbers `as_shown` take the place of
                those of the corpus.
            training: whether to drop units.
        """
        features, rows = self._features(), encoded["candidates"]
        standard = features.standard_scores(encoded["retrieval_scores"])
        numbers, vectors = self._attended(encoded, rows)
        own = {False: vectors, True: [features.statistics(rows), standard, *numbers]}
        for feature, values in self._plain(encoded, rows):
            own[feature.is_measured].append(values)
        crossed = self._interaction([tf.concat(own[True], axis=-1), *own[False]])
        learned = self.head(crossed, training=training)
        logits = learned + self._gain * standard[..., :1] + self._prior
        return tf.where(rows[..., tf.newaxis] >= 0, logits, _NONE)

    def _plain(
        self, encoded: Mapping[str, tf.Tensor], rows: tf.Tensor
    ) -> Iterator[tuple[Feature, tf.Tensor]]:
        """Features of query and candidate that are neither ids nor histories."""
        features = self._features()
        batch, width = tf.unstack(tf.shape(rows))
        for feature in features.query:
            query = self._embedding([feature], encoded)[:, tf.newaxis]
            yield feature, tf.tile(query, [1, width, 1])
        flat = features.of_candidates(tf.reshape(rows, [-1]))
        for feature in features.candidate:
            if as_shown(feature.name) in encoded:
                yield feature, encoded[as_shown(feature.name)]
                continue
            own = self._embedding([feature], flat)
            yield feature, tf.reshape(own, [batch, width, own.shape[-1]])

    def _attended(
        self, encoded: Mapping[str, tf.Tensor], rows: tf.Tensor
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Numbers and vectors: the candidate, what the history says of it, and of itself in it."""
        features = self._features()
        candidate = self._item(features.vectors(rows))
        if features.item_history is None:
            return [], [candidate]
        seen = encoded[features.item_history.name]
        known = features.known(encoded)
        same = (rows[:, :, tf.newaxis] == seen[:, tf.newaxis]) & (seen >= 0)[:, tf.newaxis]
        later = tf.cumsum(tf.cast(known, tf.int32), axis=1, reverse=True, exclusive=True)
        marks = self._marks(encoded, known, later)
        events = self._item(features.vectors(seen)) + self._event(marks)
        own = tf.cast(same, tf.float32)
        attended = self._attention(candidate, events, own, known)
        done = tf.einsum("bcl,bld->bcd", own, marks)
        return [_seen(same, known, later)], [candidate, attended, done]

    def _marks(
        self, encoded: Mapping[str, tf.Tensor], known: tf.Tensor, later: tf.Tensor
    ) -> tf.Tensor:
        """What is known of each event beside its item, `[batch, length, any]`; zeros for none."""
        marks = [self._recency(later)]
        marks += [
            self._embedding.sequence(f, encoded[f.name]) for f in self._features().other_histories
        ]
        return tf.concat(marks, axis=-1) * tf.cast(known, tf.float32)[..., tf.newaxis]


def _seen(same: tf.Tensor, known: tf.Tensor, later: tf.Tensor) -> tf.Tensor:
    """How often a candidate was seen, how many events ago last, and events in all, as log1p.

    Args:
        same: `[batch, candidates, length]`, which event is of the candidate.
        known: `[batch, length]`, which places hold an event.
        later: int32 `[batch, length]`, events after each.

    Returns:
        `[batch, candidates, 3]`; what was never seen lies just before the longest history.
    """
    times = tf.reduce_sum(tf.cast(same, tf.float32), axis=2)
    never = tf.shape(later)[1]
    ago = tf.reduce_min(tf.where(same, later[:, tf.newaxis], never), axis=2)
    total = tf.reduce_sum(tf.cast(known, tf.float32), axis=1, keepdims=True)
    columns = [times, tf.cast(ago, tf.float32), total * tf.ones_like(times)]
    return tf.math.log1p(tf.stack(columns, axis=-1))


class Ranker(tfrs.Model):
    """Trains a `RankingNetwork` by a loss of candidates, of their pairs, or of whole requests.

    Args:
        config: of the model.
        schema: of the run.
        encoder: of raw features.
        items: of the corpus.
        seed: of masks.
        prior: log odds of a candidate to be the label, where the logit begins; of several outputs,
            `[outputs]`.
    """

    def __init__(
        self,
        config: Ranking,
        schema: Schema,
        encoder: FeatureEncoder,
        items: KnownItems,
        seed: int,
        prior: float | NDArray[np.floating[Any]] = 0.0,
    ) -> None:
        super().__init__()
        features = RankerFeatures(schema, encoder, items)
        # Behind a function: frozen text encoders are no part of a model's weights.
        self._features: Callable[[], RankerFeatures] = lambda: features
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step")
        dropouts = Dropouts(config.dropout, seed, self.step)
        head = self._head(config, dropouts)
        self.network = RankingNetwork(config, features, head, np.atleast_1d(prior))
        self._position_bias = PositionBias()
        self._mean_loss = tf.keras.metrics.Mean(name="loss")
        self._pointwise = config.loss == "pointwise"
        self._task = tfrs.tasks.Ranking(loss=LOSSES[config.loss]())

    @property
    def features(self) -> RankerFeatures:
        """Makes what the ranker reads of raw requests."""
        return self._features()

    def _head(self, config: Ranking, dropouts: Dropouts) -> tf.keras.layers.Layer:
        return Tower(config.hidden, dropouts)

    def call(self, encoded: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Log odds of the candidates of encoded requests, `[batch, candidates]`.

        With `positions` int32 `[batch, candidates]` they are those at the positions; without, as in
        serving, those in the first.
        """
        logits = tf.squeeze(self.network(encoded, training=training), axis=-1)
        if "positions" in encoded:
            logits += self._position_bias(encoded["positions"])
        return logits

    def compute_loss(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Loss of a batch of requests.

        Every candidate counts, as serving ranks all of them: nothing is sampled, so there is no
        sampling to correct. Requests whose label was not retrieved are negatives alone; they tell
        the pointwise loss how rarely a list holds what is wanted.

        Args:
            inputs: beside an encoded request `label_place` int32 `[batch]`, place of the label
                among the candidates or -1, or, of shown lists, `task_labels` `[batch, candidates,
                1]`, 1 where it was clicked; and `weight` `[batch]`.
            training: whether to drop units.
        """
        logits = self(inputs, training=training)
        if "task_labels" in inputs:
            labels = tf.cast(tf.squeeze(inputs["task_labels"], axis=-1), logits.dtype)
        else:
            labels = tf.one_hot(inputs["label_place"], tf.shape(logits)[1])
        return self._loss(labels, logits, inputs)

    def _loss(
        self, labels: tf.Tensor, logits: tf.Tensor, inputs: Mapping[str, tf.Tensor]
    ) -> tf.Tensor:
        """Loss of logits `[batch, candidates]` against labels, 1 where it is what is asked for."""
        present = inputs["candidates"] >= 0
        if not self._pointwise:
            return self._task(tf.where(present, labels, ABSENT), logits, inputs["weight"])
        weights = tf.boolean_mask(inputs["weight"][:, tf.newaxis] * tf.ones_like(labels), present)
        flat = [tf.boolean_mask(t, present)[:, tf.newaxis] for t in (labels, logits)]
        return self._task(*flat, weights)

    def train_step(self, inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Learn from a batch, and count the steps, on which masks depend."""
        logs: dict[str, tf.Tensor] = super().train_step(inputs)
        self.step.assign_add(1)
        self._mean_loss.update_state(logs["loss"])
        return logs | {"loss": self._mean_loss.result()}

    def answers(self, log_odds: tf.Tensor) -> dict[str, tf.Tensor]:
        """Outputs of the signature `rank` from calibrated log odds `[batch, candidates, outputs]`.

        What is no candidate is taken out of `scores` by who calls.
        """
        return {"scores": tf.squeeze(log_odds, axis=-1)}

    def save_ranker(
        self,
        directory: Path,
        statistics: NDArray[np.float32],
        *calibrations: Calibration,
        values: Sequence[str] = (),
    ) -> None:
        """Write a SavedModel with the signature `rank`.

        It takes the raw query features by name, `candidates` int32 `[batch, any]`, corpus rows or
        -1, and `retrieval_scores` float32 of the same shape, and gives `scores`: calibrated log
        odds, -inf where there is no candidate; and what else `answers` has.

        Args:
            directory: to write.
            statistics: of the items as of the end of what is known when it serves.
            calibrations: of the logits, one for each output.
            values: fields `as_shown`. With them there is a signature `rank_as_shown` too, which
                takes them, float32 `[batch, any]`: it judges lists of the past.
        """
        self.features.renew(statistics)
        module = _Served(self, calibrations)
        signatures = {"rank": module.signature()}
        if values:
            signatures["rank_as_shown"] = module.signature(*values)
        tf.saved_model.save(module, str(directory), signatures)


class _Served(tf.Module):
    """Network and features on raw requests."""

    def __init__(self, ranker: Ranker, calibrations: Sequence[Calibration]) -> None:
        super().__init__()
        self._network = ranker.network
        self._features = ranker.features
        # Behind a function: loss and metrics of the ranker are no part of what serves.
        self._answers: Callable[[tf.Tensor], dict[str, tf.Tensor]] = lambda odds: ranker.answers(
            odds
        )
        scale, offset = np.array(calibrations, np.float32).T
        self._scale = tf.Variable(scale, trainable=False)
        self._offset = tf.Variable(offset, trainable=False)

    def signature(self, *values: str) -> Any:
        request = raw_signature(self._features.schema.query) | {
            "candidates": tf.TensorSpec([None, None], tf.int32, "candidates"),
            "retrieval_scores": tf.TensorSpec([None, None], tf.float32, "retrieval_scores"),
        }
        request |= {name: tf.TensorSpec([None, None], tf.float32, name) for name in values}

        def rank(**raw: tf.Tensor) -> dict[str, tf.Tensor]:
            logits = self._network(self._features(raw))
            answers = self._answers(self._scale * logits + self._offset)
            scores = tf.where(raw["candidates"] >= 0, answers["scores"], -np.inf)
            return answers | {"scores": scores}

        return tf.function(rank).get_concrete_function(**request)
