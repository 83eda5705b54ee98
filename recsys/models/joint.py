"""Retrieval and ranking jointly: one model, towers that both tasks share, a sum of both losses.

The way of TFRS's multitask tutorial (tensorflow.org/recommenders/examples/multitask): a head over
the embeddings of query and candidate is trained by `tfrs.tasks.Ranking` beside the retrieval.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tensorflow_recommenders as tfrs

from recsys.dataset import Corpus
from recsys.features import FeatureEncoder
from recsys.model_config import Joint, TwoTowerConfig
from recsys.models.dropout import Dropouts
from recsys.models.retrieval import TwoTower, size_of_all
from recsys.models.towers import Towers
from recsys.schema import Schema

#: Towers have fewer dropout layers than that.
_SEEDS_OF_TOWERS = 1000
#: What a judged event has for itself, beside its query features.
_OWN = ("sequence", "known")


class RankingHead(tf.keras.layers.Layer):
    """Log odds of an event to be positive, from the embeddings of its query and its item.

    Beside both vectors it reads their product by element: layers over the two alone hardly learn a
    dot product (Rendle et al., "Neural Collaborative Filtering vs. Matrix Factorization Revisited",
    RecSys 2020).

    Args:
        config: its layers.
        dim: of the embeddings.
        normalized: whether their length is 1; then they are scaled to entries of about 1.
        dropouts: maker of the dropout layers, one before each layer.
        seed: of the weights, so that those of the towers do not depend on whether there is a head.
    """

    def __init__(
        self, config: Joint, dim: int, normalized: bool, dropouts: Dropouts, seed: int
    ) -> None:
        super().__init__()
        self.dim = dim
        self._scale = dim**0.5 if normalized else 1.0
        width, self._hidden, self._dropouts = 3 * dim, [], []
        for number, units in enumerate((*config.hidden, 1)):
            last = number == len(config.hidden)
            initializer = tf.keras.initializers.GlorotUniform(seed + number)
            layer = tf.keras.layers.Dense(
                units, None if last else "gelu", kernel_initializer=initializer
            )
            layer.build([None, width])
            self._hidden.append(layer)
            self._dropouts.append(dropouts())
            width = units

    def call(self, queries: tf.Tensor, candidates: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Give log odds `[...]` of `[..., dim]` and `[..., dim]`."""
        query, candidate = queries * self._scale, candidates * self._scale
        hidden = tf.concat([query, candidate, query * candidate], axis=-1)
        for layer, dropout in zip(self._hidden, self._dropouts, strict=True):
            hidden = layer(dropout(hidden, training=training))
        return tf.squeeze(hidden, axis=-1)


class JointTwoTower(TwoTower):
    """Two towers and a `RankingHead`: `retrieval_weight` x softmax + `weight` x log loss.

    A query is embedded once for both tasks, along its history. Labels of retrieval and judged
    events are two lists of a batch: what is disliked is judged, and nothing to retrieve.

    Args:
        config: of the model, with `joint`.
        schema: of the run.
        encoder: of raw features.
        corpus: candidates.
        seed: of masks and negatives.
        exclude_seen: see `TwoTower`.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        schema: Schema,
        encoder: FeatureEncoder,
        corpus: Corpus,
        seed: int,
        exclude_seen: bool = False,
    ) -> None:
        super().__init__(config, schema, encoder, corpus, seed, exclude_seen)
        assert config.joint is not None, "configs without `joint` have a TwoTower"
        self._joint = config.joint
        dropouts = Dropouts(config.joint.dropout, seed + _SEEDS_OF_TOWERS, self.step)
        self.head = RankingHead(
            config.joint, config.embedding_dim, config.loss.normalize, dropouts, seed
        )
        # Losses of replicas add up: a sum, that is divided by the events of all of them.
        loss = tf.keras.losses.BinaryCrossentropy(
            from_logits=True, reduction=tf.keras.losses.Reduction.SUM
        )
        self._ranking = tfrs.tasks.Ranking(loss=loss)
        self._task_losses = {
            name: tf.keras.metrics.Mean(name=f"{name}_loss") for name in ("retrieval", "ranking")
        }

    @property
    def towers(self) -> Towers:
        """The towers on raw features, and the head, to be saved."""
        return Towers(
            self._schema, self._encoder(), self.query_tower, self.candidate_tower, self.head
        )

    def compute_loss(self, inputs: Mapping[str, Any], training: bool = False) -> tf.Tensor:
        """Weighted sum of both losses of encoded training batches, or this replica's share of it.

        Args:
            inputs: those of `TwoTower`, and `judged`: by name the query features of the judged
                events that are no histories, and `sequence`, `known`, int32; `row`, corpus row of
                the item; `outcome`, 1 or 0; `weight`, `[events]` each; `total`, events of all
                replicas, which ask each other where it is not there.
            training: whether to drop units.
        """
        judged = inputs["judged"]
        labels = {name: values for name, values in inputs.items() if name != "judged"}
        queries = self.query_tower(self._all_queries(labels, judged), training=training)
        count = tf.size(labels["row"])
        own = {name: values[:count] for name, values in queries.items()}
        losses = {
            "retrieval": self._retrieval_loss(own, labels, training),
            "ranking": self._ranking_loss(queries["embedding"][count:], judged, training),
        }
        if training:
            replicas = tf.distribute.get_strategy().num_replicas_in_sync
            for name, loss in losses.items():
                self._task_losses[name].update_state(loss * replicas)
        joint = self._joint
        return joint.retrieval_weight * losses["retrieval"] + joint.weight * losses["ranking"]

    def train_step(self, inputs: Mapping[str, Any]) -> dict[str, tf.Tensor]:
        """Take one step, and report both losses beside their sum."""
        logs = super().train_step(inputs)
        return logs | {metric.name: metric.result() for metric in self._task_losses.values()}

    @property
    def metrics(self) -> list[tf.keras.metrics.Metric]:
        """Metrics that are reset at the start of an epoch."""
        return [*super().metrics, *self._task_losses.values()]

    @tf.function(reduce_retracing=True)
    def log_odds(self, inputs: Mapping[str, Any]) -> tf.Tensor:
        """Log odds of the judged events of an encoded batch, `[events]`, as a server gives them."""
        judged = inputs["judged"]
        queries = self.query_tower(dict(inputs) | dict(judged), training=False)
        return self.head(queries["embedding"], self._embed_rows(judged["row"], training=False))

    def _all_queries(
        self, labels: Mapping[str, tf.Tensor], judged: Mapping[str, tf.Tensor]
    ) -> dict[str, tf.Tensor]:
        """Queries of the labels, then of the judged events; they share the histories."""
        others = [f.name for f in self._schema.query if f.kind != "history"]
        both = {n: tf.concat([labels[n], judged[n]], axis=0) for n in (*others, *_OWN)}
        return dict(labels) | both

    def _ranking_loss(
        self, queries: tf.Tensor, judged: Mapping[str, tf.Tensor], training: bool
    ) -> tf.Tensor:
        candidates = self._embed_rows(judged["row"], training)
        logits = self.head(queries, candidates, training=training)
        columns = [tf.expand_dims(t, axis=1) for t in (judged["outcome"], logits)]
        total = judged["total"] if "total" in judged else size_of_all(logits, self.step.device)
        loss = self._ranking(*columns, sample_weight=judged["weight"])
        return loss / tf.cast(tf.maximum(total, 1), tf.float32)
