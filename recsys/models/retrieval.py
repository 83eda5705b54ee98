"""Two-tower retrieval as a `tfrs.Model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs
from numpy.typing import NDArray

from recsys.dataset import Corpus
from recsys.features import FeatureEmbedding, FeatureEncoder
from recsys.losses import Sampling, Seen, Softmax
from recsys.model_config import TwoTowerConfig
from recsys.models.dropout import Dropouts
from recsys.models.towers import CandidateTower, ItemEmbedding, QueryTower, Towers
from recsys.schema import Schema

_EMBED_BATCH = 16_384
#: Keeps the draws of popular items apart from all others of a step.
_POPULAR_SALT = 0x5EED_0000_0000
#: Log of a probability that takes a candidate out of every softmax but that of its own query.
_OUT_OF_REACH = 1e9


@dataclass(frozen=True, slots=True)
class _Rows:
    """What steps read rows of, beside the weights: no part of a checkpoint, so Keras sees no list.

    Attributes:
        features: encoded candidate features by name, `[num_items, ...]`.
        of_vocabulary: corpus row of each value of the item id's vocabulary, int32.
        label_share: `[num_warm]`.
        label_ends: their running sum, float64: the tail of a large catalogue would be lost in a
            single one.
    """

    features: Mapping[str, tf.Tensor | tf.Variable]
    of_vocabulary: tf.Tensor | tf.Variable
    label_share: tf.Tensor | tf.Variable
    label_ends: tf.Tensor | tf.Variable

    @classmethod
    def of(cls, features: Mapping[str, tf.Tensor], *others: tf.Tensor) -> _Rows:
        """Put them on the parameter servers, if there are any.

        Tensors would travel as a whole from the chief to a worker with every step.
        """
        strategy = tf.distribute.get_strategy()
        if not isinstance(strategy, tf.distribute.ParameterServerStrategy):
            return cls(features, *others)

        def put(values: tf.Tensor) -> tf.Variable:
            return tf.Variable(values, trainable=False)

        return cls({name: put(values) for name, values in features.items()}, *map(put, others))


class TwoTower(tfrs.Model):
    """Query and candidate tower trained by a softmax over candidates.

    The features of the whole corpus live in the model, so that a label carries no more than its
    corpus row, and negatives can be drawn from all items, not from the batch alone.

    Args:
        config: of the model.
        schema: of the run.
        encoder: of raw features.
        corpus: candidates.
        seed: of masks and negatives.
        exclude_seen: seen items are never recommended, so they are no negatives either.
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
        super().__init__()
        self._seed = seed
        self._schema = schema
        # Behind a function: frozen text encoders are no part of a checkpoint.
        self._encoder: Callable[[], FeatureEncoder] = lambda: encoder
        self._config = config
        self._exclude_seen = exclude_seen
        self.step = tf.Variable(
            0,
            dtype=tf.int64,
            trainable=False,
            name="step",
            # Every replica counts the same steps.
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )
        self._loss = tf.keras.metrics.Mean(name="loss")
        # A metric is that of all replicas already: Keras would add it up over them.
        self.distribute_reduction_method = "first"
        encoded = encoder({name: tf.constant(v) for name, v in corpus.features.items()})
        self._num_items = len(corpus)
        vocabulary_rows = _rows_of_vocabulary(schema, encoder, corpus)
        self._build_towers(encoded, vocabulary_rows)
        # Items that training never saw are no negatives: they would only learn to be disliked.
        self._num_warm = max(1, int(np.count_nonzero(corpus.count)))
        # No share is zero: labels of the latest events, learned in the end, may be new ones.
        labels = np.maximum(corpus.labels[: self._num_warm], 0.5)
        label_share = tf.constant(labels / labels.sum(), tf.float32)
        label_ends = tf.constant(np.cumsum(labels / labels.sum()), tf.float64)
        self._corpus = _Rows.of(encoded, vocabulary_rows, label_share, label_ends)
        self._full = self._num_warm <= config.loss.full_softmax_up_to
        self._task = Softmax(
            config.loss.temperature,
            config.loss.num_hard_negatives,
            config.loss.half_precision,
            config.loss.label_smoothing,
        )

    def _build_towers(self, corpus: Mapping[str, tf.Tensor], vocabulary_rows: tf.Tensor) -> None:
        config, schema = self._config, self._schema
        dropouts = Dropouts(config.dropout, self._seed, self.step)
        known = {name: _gather_or_zero(values, vocabulary_rows) for name, values in corpus.items()}

        def items() -> tuple[FeatureEmbedding, ItemEmbedding]:
            sizes = self._encoder().vocabulary_sizes()
            embedding = FeatureEmbedding(schema, sizes, config.embedding_dim)
            dropped = (dropouts(config.id_dropout), dropouts(config.id_dropout))
            return embedding, ItemEmbedding(schema, embedding, config, known, dropped)

        embedding, listed = items()
        candidates = listed if config.share_item_embeddings else items()[1]
        repeats = config.history.repeats and not self._exclude_seen
        repeats = repeats and len(schema.item_histories) == 1
        self.query_tower = QueryTower(schema, embedding, listed, config, dropouts, repeats)
        dropout = dropouts(config.candidate_dropout)
        self.candidate_tower = CandidateTower(candidates, config, dropout)

    def connect(self, neighbours: NDArray[np.int64]) -> None:
        """Tell which items lie close, before training.

        Args:
            neighbours: what `recsys.neighbours` finds, `[vocabulary, config.num_neighbours]`.
        """
        self.query_tower.items.connect(neighbours)
        if not self._config.share_item_embeddings:
            self.candidate_tower.items.connect(neighbours)

    @property
    def towers(self) -> Towers:
        """The towers on raw features, to be saved."""
        return Towers(self._schema, self._encoder(), self.query_tower, self.candidate_tower)

    def call(
        self, encoded: Mapping[str, tf.Tensor], training: bool = False
    ) -> dict[str, tf.Tensor]:
        """Embed encoded query features: what `QueryTower` gives."""
        return self.query_tower(encoded, training=training)

    def compute_loss(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Loss of encoded training batches, or this replica's share of it.

        Args:
            inputs: beside encoded features `row` and `weight`, `[batch]`: corpus row of the label
                and what it counts; `pool`, `[labels of all replicas]`: rows of all labels of the
                step; `place`, int32 `[batch]`: which of them are the own. Replicas whose inputs
                lack these two ask each other.
            training: whether to drop units.
        """
        return self._retrieval_loss(self.query_tower(inputs, training=training), inputs, training)

    def _retrieval_loss(
        self, queries: Mapping[str, tf.Tensor], inputs: Mapping[str, tf.Tensor], training: bool
    ) -> tf.Tensor:
        if "pool" not in inputs:
            inputs = {**inputs, **_pool(inputs["row"], self.step.device)}
        rows, labels, sampling = self._candidates(inputs)
        seen = None
        if self._exclude_seen or "repeat" in queries:
            seen = Seen(self._seen(inputs, rows), queries.get("repeat"))
        # Losses of replicas add up to the mean over the labels of all.
        share = tf.size(inputs["row"]) / tf.maximum(tf.size(inputs["pool"]), 1)
        return tf.cast(share, tf.float32) * self._task(
            queries["embedding"],
            self._embed_rows(rows, training),
            labels,
            sample_weight=inputs["weight"],
            sampling=sampling,
            seen=seen,
        )

    def train_step(self, inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Take one step, and count it: masks and negatives are functions of the count."""
        with tf.GradientTape() as tape:
            loss = self.compute_loss(inputs, training=True)
        gradients = self.gradients(tape, loss)
        pairs = self.optimizer.aggregate_gradients(
            list(zip(gradients, self.trainable_variables, strict=True))
        )
        if self.optimizer.global_clipnorm:
            # Keras takes the norm of rows that are yet to be added up, as many as replicas have.
            pairs = [(_each_row_once(gradient), variable) for gradient, variable in pairs]
        self.optimizer.apply_gradients(pairs, skip_gradients_aggregation=True)
        self.step.assign_add(1)
        # `tfrs.Model` reports the loss of the last batch; an epoch is judged by its mean.
        # The mean over replicas of their shares is so the mean loss of the step.
        self._loss.update_state(loss * tf.distribute.get_strategy().num_replicas_in_sync)
        return {"loss": self._loss.result()}

    def gradients(
        self, tape: tf.GradientTape, loss: tf.Tensor
    ) -> list[tf.Tensor | tf.IndexedSlices]:
        """Gradients by trainable variable, slices of rows where a step reads few rows of a table.

        The exact softmax reads all rows of its candidates. As slices they would be sent by each
        replica to all others, and sorted out before the optimizer adds them up.
        """
        gradients = tape.gradient(loss, self.trainable_variables)
        dense = {table.ref() for table in self.candidate_tower.tables} if self._full else ()
        return [
            tf.convert_to_tensor(gradient) if variable.ref() in dense else gradient
            for gradient, variable in zip(gradients, self.trainable_variables, strict=True)
        ]

    @property
    def metrics(self) -> list[tf.keras.metrics.Metric]:
        """Metrics that are reset at the start of an epoch."""
        return [self._loss]

    @tf.function(reduce_retracing=True)
    def embed_queries(self, encoded: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Embed encoded query features as a server would: what `QueryTower` gives."""
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
        lookup = tf.nn.embedding_lookup
        encoded = {name: lookup(values, rows) for name, values in self._corpus.features.items()}
        return self.candidate_tower(encoded, training=training)

    def _candidates(
        self, inputs: Mapping[str, tf.Tensor]
    ) -> tuple[tf.Tensor, tf.Tensor, Sampling | None]:
        """Corpus rows of a step's candidates, places of the labels in them, and how they came."""
        if self._full:
            return tf.range(self._num_warm), inputs["row"], None
        rows, places, log_probability = self._draw(inputs["pool"])
        labels = tf.gather(places, inputs["place"])
        related = None
        if self._config.loss.in_batch_negatives:
            # Labels that do not count may stand for items without a row.
            counting = tf.where(inputs["weight"] > 0, labels, -1)
            related = _labels_of_sequence(counting, inputs["sequence"])
        return rows, labels, Sampling(log_probability, related)

    def _draw(self, pool: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Draw the candidates of a step: the labels of the batch and mixed negatives, each once.

        Every replica knows the labels of all and draws the same candidates, so that more replicas
        mean no other negatives. No vectors have to be gathered for that.

        Mixed negatives let the model see rare items too (Yang et al., "Mixed Negative Sampling",
        WWW 2020). As a set holds no item twice, there are no accidental hits to remove.

        Returns:
            Corpus rows `[num_candidates]`, places of the labels in them `[labels]`, and the log of
            each candidate's probability to be a negative of a query whose label it is not.
        """
        loss = self._config.loss
        drawn = tf.concat([self._uniform(), self._popular()], axis=0)
        size = tf.size(pool)
        rows, place = tf.unique(tf.concat([pool, drawn], axis=0))
        by_share = loss.num_popular_negatives + (size if loss.in_batch_negatives else 0)
        share = tf.gather(self._corpus.label_share, rows)
        missed = tf.cast(by_share, tf.float32) * tf.math.log1p(-share)
        missed += loss.num_uniform_negatives * np.log1p(-1 / max(2, self._num_warm))
        log_probability = tf.math.log(-tf.math.expm1(missed))
        if not loss.in_batch_negatives:
            ones = tf.ones_like(drawn, tf.float32)
            times = tf.math.unsorted_segment_sum(ones, place[size:], tf.size(rows))
            log_probability = tf.where(times > 0, log_probability, _OUT_OF_REACH)
        return rows, place[:size], log_probability

    def _uniform(self) -> tf.Tensor:
        """Draw corpus rows, each as likely, `[num_uniform_negatives]`."""
        shape = [self._config.loss.num_uniform_negatives]
        return tf.random.stateless_uniform(
            shape, self._now(), maxval=self._num_warm, dtype=tf.int32
        )

    def _popular(self) -> tf.Tensor:
        """Draw corpus rows by how often they are labels, `[num_popular_negatives]`."""
        shape = [self._config.loss.num_popular_negatives]
        places = tf.random.stateless_uniform(shape, self._now() ^ _POPULAR_SALT, dtype=tf.float64)
        rows = tf.searchsorted(self._corpus.label_ends, places, side="right")
        return tf.minimum(rows, self._num_warm - 1)

    def _now(self) -> tf.Tensor:
        return tf.stack([tf.constant(self._seed, tf.int64), self.step])

    def _seen(self, inputs: Mapping[str, tf.Tensor], rows: tf.Tensor) -> tf.Tensor:
        """Places in `rows` of what a query's history lists, `[batch, any]`; -1 for none."""
        place = tf.tensor_scatter_nd_update(
            tf.fill([self._num_items + 1], -1), rows[:, tf.newaxis], tf.range(tf.size(rows))
        )
        lists = [inputs[f.name] for f in self._schema.item_histories]
        if not lists:
            return tf.zeros([tf.size(inputs["row"]), 0], tf.int32)
        listed = tf.gather(tf.concat(lists, axis=1), inputs["sequence"])
        earlier = tf.range(tf.shape(lists[0])[1]) < inputs["known"][:, tf.newaxis]
        # A row of -1 stands for no item: it reads the last place, which is never filled.
        corpus_rows = tf.gather(self._corpus.of_vocabulary, listed) % (self._num_items + 1)
        return tf.where(tf.tile(earlier, [1, len(lists)]), tf.gather(place, corpus_rows), -1)


def _pool(rows: tf.Tensor, device: str) -> dict[str, tf.Tensor]:
    """Gather the labels of all replicas; the own ones stand where the replica's turn is."""
    context = tf.distribute.get_replica_context()
    # What TensorFlow has yet to place cannot be gathered.
    with tf.device(device):
        sizes = context.all_gather(tf.identity(tf.size(rows)[tf.newaxis]), axis=0)
        pool = context.all_gather(tf.identity(rows), axis=0)
    before = tf.reduce_sum(sizes[: context.replica_id_in_sync_group])
    return {"pool": pool, "place": before + tf.range(tf.size(rows))}


def size_of_all(values: tf.Tensor, device: str) -> tf.Tensor:
    """Ask the replicas how many values they have together."""
    context = tf.distribute.get_replica_context()
    # What TensorFlow has yet to place cannot be gathered.
    with tf.device(device):
        sizes = context.all_gather(tf.identity(tf.size(values)[tf.newaxis]), axis=0)
    return tf.reduce_sum(sizes)


def _labels_of_sequence(labels: tf.Tensor, sequence: tf.Tensor) -> tf.Tensor:
    """Labels of all queries that share a query's sequence, `[batch, any]`; -1 for none.

    They come into a batch together, whatever their popularity says of it.
    """
    by_sequence = tf.RaggedTensor.from_value_rowids(labels, tf.cast(sequence, tf.int64))
    return tf.gather(by_sequence.to_tensor(-1), sequence)


def _each_row_once(gradient: tf.Tensor | tf.IndexedSlices) -> tf.Tensor | tf.IndexedSlices:
    """Add up the slices of equal rows."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    rows, place = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, place, tf.size(rows))
    return tf.IndexedSlices(values, rows, gradient.dense_shape)


def _rows_of_vocabulary(schema: Schema, encoder: FeatureEncoder, corpus: Corpus) -> tf.Tensor:
    """Corpus row of every value of the item id's vocabulary, int32; -1 for no item."""
    item = next(f for f in schema.candidate if f.source_column == "item")
    values = tf.constant(encoder.vocabulary(item.name))
    rows = tf.constant(corpus.features[item.name], tf.string)
    initializer = tf.lookup.KeyValueTensorInitializer(rows, tf.range(len(corpus)))
    return tf.lookup.StaticHashTable(initializer, default_value=-1).lookup(values)


def _gather_or_zero(values: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Rows of `values`, zeros where the row is -1."""
    found = tf.gather(values, tf.maximum(rows, 0))
    shape = [-1] + [1] * (len(values.shape) - 1)
    return tf.where(tf.reshape(rows >= 0, shape), found, tf.zeros_like(found))
