"""The retrieval loss: softmax over all or sampled candidates, as a `tfrs.tasks.Retrieval`."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf
import tensorflow_recommenders as tfrs

#: Queries whose logits are held at a time: a tile of them stays near the processor's cache.
_TILE = 256
#: A GPU is only busy with larger ones; so many logits, 256 MiB of them, are held at a time there.
_LOGITS_OF_GPU_TILE = 2**26
_MASKED = -1e9


class Seen(NamedTuple):
    """Candidates that the queries of a batch have seen.

    Attributes:
        rows: int32 `[batch, any]`, rows of the candidates; -1 for none.
        scores: `[batch, any]`, added to their dot products. Without them the seen are no negatives
            of the query, as they will never be recommended to it; a label stays one.
    """

    rows: tf.Tensor
    scores: tf.Tensor | None = None


class Sampling(NamedTuple):
    """How candidates came to be drawn.

    Attributes:
        log_probability: `[num_candidates]`, of each candidate to be among them when it is no label
            of the query.
        related: int32 `[batch, any]`, rows of candidates that are there because of the query, such
            as other labels of its user, so that no probability corrects them: they are no
            negatives of it. -1 for none.
    """

    log_probability: tf.Tensor
    related: tf.Tensor | None = None


class _Targets(NamedTuple):
    labels: tf.Tensor
    weight: tf.Tensor
    bias: tf.Tensor
    seen: tf.Tensor
    related: tf.Tensor


class Softmax(tfrs.tasks.Retrieval):
    """Cross-entropy of the label among candidates that all queries of a batch share.

    Over the whole corpus it is the exact softmax. Over a sample, subtracting the log of the
    probability that a negative is in the sample makes its sum an unbiased view of the exact one (Yi
    et al., "Sampling-Bias-Corrected Neural Modeling", RecSys 2019). The label is there for sure, so
    its logit is not corrected (Khrylchenko et al., "Correcting the LogQ Correction", RecSys 2025).
    Unlike `tfrs.layers.loss.SamplingProbablityCorrection`, probabilities are never clipped: its
    floor of 1e-6 is wrong for catalogues beyond a million items.

    The gradient is computed with the loss, a tile of queries at a time, so that the
    `[batch, num_candidates]` logits are never held.

    Args:
        temperature: divides the logits.
        num_hard_negatives: keep only this many candidates of the highest logits, per query, beside
            the label; all when None (as in `tfrs.tasks.Retrieval`).
        half_precision: multiply in bfloat16; sums and the softmax itself stay in float32.
        label_smoothing: share of the target that all candidates divide evenly (Szegedy et al.,
            CVPR 2016); masked ones have none of it.
    """

    def __init__(
        self,
        temperature: float,
        num_hard_negatives: int | None = None,
        half_precision: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(temperature=temperature, num_hard_negatives=num_hard_negatives)
        self._label_smoothing = label_smoothing
        self._dtype = tf.bfloat16 if half_precision else tf.float32

    def call(
        self,
        query_embeddings: tf.Tensor,
        candidate_embeddings: tf.Tensor,
        labels: tf.Tensor,
        sample_weight: tf.Tensor | None = None,
        sampling: Sampling | None = None,
        seen: Seen | None = None,
    ) -> tf.Tensor:
        """Return the mean loss of a batch.

        Args:
            query_embeddings: `[batch, dim]`.
            candidate_embeddings: `[num_candidates, dim]`, each item at most once.
            labels: int32 `[batch]`, rows of `candidate_embeddings`.
            sample_weight: `[batch]`.
            sampling: how the candidates were drawn; None when they are the whole corpus.
            seen: candidates that the queries have seen.

        Returns:
            Scalar: sum of weighted cross-entropies divided by the batch size; 0 of no query.
        """
        batch = tf.shape(labels)[0]
        weight = tf.ones([batch]) if sample_weight is None else sample_weight
        bias, related = tf.zeros([tf.shape(candidate_embeddings)[0]]), None
        if sampling is not None:
            bias, related = -sampling.log_probability, sampling.related
        rows, scores = Seen(tf.zeros([batch, 0], tf.int32)) if seen is None else seen
        added = tf.zeros(tf.shape(rows)) if scores is None else scores
        if related is None:
            related = tf.zeros([batch, 0], tf.int32)
        targets = _Targets(labels, weight, bias, rows, related)

        @tf.custom_gradient
        def loss(queries: tf.Tensor, candidates: tf.Tensor, added: tf.Tensor) -> tf.Tensor:
            value, *gradients = self._loss_and_gradients(
                queries, candidates, added, targets, masks=scores is None
            )
            return value, lambda upstream: [upstream * gradient for gradient in gradients]

        return loss(query_embeddings, candidate_embeddings, added)

    @tf.function(reduce_retracing=True)
    def _loss_and_gradients(
        self,
        queries: tf.Tensor,
        candidates: tf.Tensor,
        added: tf.Tensor,
        targets: _Targets,
        masks: bool,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return the loss and its gradients by query, candidate and score of the seen."""
        dim = candidates.shape[1]
        scaled = tf.cast(candidates / self._temperature, self._dtype)
        size = _tile(tf.shape(candidates)[0])
        # One at least: without a query there are no tiles to concatenate.
        num_tiles = tf.maximum((tf.shape(targets.labels)[0] + size - 1) // size, 1)
        by_query = tf.TensorArray(tf.float32, num_tiles, False, element_shape=[None, dim])
        by_added = tf.TensorArray(tf.float32, num_tiles, False, element_shape=[None, None])
        by_candidate = tf.zeros_like(candidates)
        total = tf.constant(0.0)
        for tile in tf.range(num_tiles):
            rows = slice(tile * size, (tile + 1) * size)
            seen = targets.seen[rows]
            query = tf.cast(queries[rows], self._dtype)
            logits = tf.cast(tf.matmul(query, scaled, transpose_b=True), tf.float32)
            logits += _of_negatives(targets.bias, targets.labels[rows])
            logits = self._adjusted(logits, targets, rows, added, masks)
            target = self._target(logits, targets.labels[rows])
            loss, error = _errors(logits, target, targets.weight[rows])
            at_seen = tf.gather(error, tf.maximum(seen, 0), batch_dims=1)
            error = tf.cast(error, self._dtype)
            total += loss
            by_query = by_query.write(tile, tf.cast(tf.matmul(error, scaled), tf.float32))
            by_added = by_added.write(tile, tf.where(seen >= 0, at_seen, 0.0))
            by_candidate += tf.cast(tf.matmul(error, query, transpose_a=True), tf.float32)
        batch = tf.cast(tf.maximum(tf.shape(targets.labels)[0], 1), tf.float32)
        scale = batch * self._temperature
        return (
            total / batch,
            by_query.concat() / batch,
            by_candidate / scale,
            by_added.concat() / scale,
        )

    def _adjusted(
        self, logits: tf.Tensor, targets: _Targets, rows: slice, added: tf.Tensor, masks: bool
    ) -> tf.Tensor:
        """Treat the seen as the caller wants it, and drop easy negatives."""
        labels, seen = targets.labels[rows], targets.seen[rows]
        logits = _masked(logits, targets.related[rows], labels)
        if masks:
            logits = _masked(logits, seen, labels)
        else:
            logits = _added(logits, seen, added[rows] / self._temperature)
        return logits if self._num_hard_negatives is None else self._hardest(logits, labels)

    def _target(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Return the probabilities that are wanted, `[batch, num_candidates]`."""
        target = tf.one_hot(labels, tf.shape(logits)[1])
        if not self._label_smoothing:
            return target
        reached = tf.cast(logits > _MASKED / 2, tf.float32)
        even = reached / tf.reduce_sum(reached, axis=1, keepdims=True)
        return (1 - self._label_smoothing) * target + self._label_smoothing * even

    def _hardest(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Mask all but the hardest negatives and the label."""
        is_label = tf.one_hot(labels, tf.shape(logits)[1], on_value=True, off_value=False)
        kept = tf.clip_by_value(tf.shape(logits)[1] - 1, 1, self._num_hard_negatives)
        hardest = tf.math.top_k(tf.where(is_label, _MASKED, logits), kept).values
        return tf.where(is_label | (logits >= hardest[:, -1:]), logits, _MASKED)


def _tile(num_candidates: tf.Tensor) -> tf.Tensor:
    """Return how many queries are a tile where TensorFlow puts the products."""
    if not tf.config.list_logical_devices("GPU"):
        return tf.constant(_TILE)
    return tf.maximum(_TILE, _LOGITS_OF_GPU_TILE // num_candidates)


def _of_negatives(bias: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Return the bias of each candidate, 0 for the label, `[batch, num_candidates]`."""
    is_label = tf.one_hot(labels, tf.size(bias), on_value=True, off_value=False)
    return tf.where(is_label, 0.0, bias)


def _errors(logits: tf.Tensor, target: tf.Tensor, weight: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the sum of cross-entropies, and their gradients by logit, `[batch, candidates]`."""
    logp = tf.nn.log_softmax(logits)
    loss = -tf.reduce_sum(weight * tf.reduce_sum(target * logp, axis=1))
    return loss, (tf.exp(logp) - target) * weight[:, tf.newaxis]


def _masked(logits: tf.Tensor, rows: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Mask the listed candidates of each query, but never its label."""
    pairs, _ = _pairs(tf.where(rows == labels[:, tf.newaxis], -1, rows))
    return tf.tensor_scatter_nd_update(logits, pairs, tf.fill([tf.shape(pairs)[0]], _MASKED))


def _added(logits: tf.Tensor, seen: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
    """Add the scores; an item that was seen twice gets both."""
    pairs, place = _pairs(seen)
    return tf.tensor_scatter_nd_add(logits, pairs, tf.gather_nd(scores, place))


def _pairs(seen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return query and candidate of each seen item, and its place in `seen`, `[n, 2]` both."""
    place = tf.cast(tf.where(seen >= 0), tf.int32)
    return tf.stack([place[:, 0], tf.gather_nd(seen, place)], axis=1), place
