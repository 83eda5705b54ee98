"""Two-tower retrieval as a `tfrs.Model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from recsys.config import TwoTowerConfig
from recsys.dataset import Corpus
from recsys.features import FeatureEmbedding, FeatureEncoder
from recsys.losses import FullSoftmax, SampledSoftmax
from recsys.models.towers import CandidateTower, QueryTower, StatelessDropout, Towers
from recsys.schema import Schema

_EMBED_BATCH = 16_384


class TwoTower(tfrs.Model):
    """Query and candidate tower trained by a softmax over candidates.

    The features of the whole corpus live in the model, so that an example carries no more of its
    label than the corpus row, and negatives can be drawn from all items, not from the batch alone.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        schema: Schema,
        encoder: FeatureEncoder,
        corpus: Corpus,
        seed: int,
    ) -> None:
        super().__init__()
        self._seed = seed
        self._schema = schema
        # Behind a function: frozen text encoders are no part of a checkpoint.
        self._encoder: Callable[[], FeatureEncoder] = lambda: encoder
        self._config = config
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step")
        self._loss = tf.keras.metrics.Mean(name="loss")
        self._build_towers()
        self._corpus = encoder({name: tf.constant(v) for name, v in corpus.features.items()})
        self._num_items = len(corpus)
        # Items that training never saw are no negatives: they would only learn to be disliked.
        self._num_warm = max(1, int(np.count_nonzero(corpus.count)))
        labels = corpus.labels[: self._num_warm]
        self._label_share = tf.constant(labels / max(1, labels.sum()), tf.float32)
        self._full = self._num_warm <= config.loss.full_softmax_up_to
        softmax = FullSoftmax if self._full else SampledSoftmax
        self._task = softmax(temperature=config.loss.temperature)

    def _build_towers(self) -> None:
        config = self._config
        embedding = FeatureEmbedding(
            self._schema, self._encoder().vocabulary_sizes(), config.embedding_dim
        )
        # One for each place: equal seeds would drop the same units everywhere.
        dropouts = [
            StatelessDropout(config.dropout, self._seed + place, self.step)
            for place in range(2 + len(config.hidden))
        ]
        self.query_tower = QueryTower(self._schema, embedding, config, dropouts[1:])
        self.candidate_tower = CandidateTower(self._schema, embedding, config, dropouts[0])

    @property
    def towers(self) -> Towers:
        """The towers on raw features, to be saved."""
        return Towers(self._schema, self._encoder(), self.query_tower, self.candidate_tower)

    def call(self, encoded: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Embed encoded query features, `[batch, embedding_dim]`."""
        return self.query_tower(encoded, training=training)

    def compute_loss(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Loss of encoded query features with `row` (corpus row of the label) and `weight`."""
        queries = self.query_tower(inputs, training=training)
        if self._full:
            candidates = self._embed_rows(tf.range(self._num_warm), training)
            return self._task(queries, candidates, inputs["row"], inputs["weight"])
        rows = tf.concat([inputs["row"], self._draw_uniform()], axis=0)
        return self._task(
            queries,
            self._embed_rows(rows, training),
            rows,
            self._log_expected_draws(rows, tf.shape(inputs["row"])[0]),
            inputs["weight"],
        )

    def train_step(self, inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Take one step, and count it: masks and negatives are functions of the count."""
        with tf.GradientTape() as tape:
            loss = self.compute_loss(inputs, training=True)
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
        self.step.assign_add(1)
        # `tfrs.Model` reports the loss of the last batch; an epoch is judged by its mean.
        self._loss.update_state(loss)
        return {"loss": self._loss.result()}

    @property
    def metrics(self) -> list[tf.keras.metrics.Metric]:
        """Metrics that are reset at the start of an epoch."""
        return [self._loss]

    @tf.function(reduce_retracing=True)
    def embed_queries(self, encoded: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Embed encoded query features as a server would, `[batch, embedding_dim]`."""
        return self.query_tower(encoded, training=False)

    def embed_corpus(self) -> tf.Tensor:
        """Embed every candidate, `[num_items, embedding_dim]`, a batch at a time."""
        starts = range(0, self._num_items, _EMBED_BATCH)
        parts = [self._embed_range(tf.constant(start)) for start in starts]
        return tf.concat(parts, axis=0)

    @tf.function
    def _embed_range(self, start: tf.Tensor) -> tf.Tensor:
        stop = tf.minimum(start + _EMBED_BATCH, self._num_items)
        return self._embed_rows(tf.range(start, stop), training=False)

    def _embed_rows(self, rows: tf.Tensor, training: bool) -> tf.Tensor:
        encoded = {name: tf.gather(value, rows) for name, value in self._corpus.items()}
        return self.candidate_tower(encoded, training=training)

    def _draw_uniform(self) -> tf.Tensor:
        return tf.random.stateless_uniform(
            [self._config.loss.num_uniform_negatives],
            seed=tf.stack([tf.constant(self._seed, tf.int64), self.step]),
            maxval=self._num_warm,
            dtype=tf.int32,
        )

    def _log_expected_draws(self, rows: tf.Tensor, batch: tf.Tensor) -> tf.Tensor:
        in_batch = tf.cast(batch, tf.float32) * tf.gather(self._label_share, rows)
        uniform = self._config.loss.num_uniform_negatives / self._num_warm
        return tf.math.log(in_batch + uniform)
