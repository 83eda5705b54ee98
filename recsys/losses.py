"""The retrieval loss: softmax over all or sampled candidates, as a `tfrs.tasks.Retrieval`."""

from __future__ import annotations

import tensorflow as tf
import tensorflow_recommenders as tfrs

#: Queries whose logits are held at a time: a tile of them stays near the processor's cache.
_TILE = 256
_MASKED = -1e9


class Softmax(tfrs.tasks.Retrieval):
    """Cross-entropy of the label among candidates that all queries of a batch share.

    Over the whole corpus it is the exact softmax. Over a sample, subtracting the log of the
    probability that a candidate is in the sample makes it an unbiased view of the exact one (Yi et
    al., "Sampling-Bias-Corrected Neural Modeling", RecSys 2019). Unlike
    `tfrs.layers.loss.SamplingProbablityCorrection`, probabilities are never clipped: its floor of
    1e-6 is wrong for catalogues beyond a million items.

    The gradient is computed with the loss, a tile of queries at a time, so that the
    `[batch, num_candidates]` logits are never held.

    Args:
        temperature: divides the logits.
        num_hard_negatives: keep only this many candidates of the highest logits, per query, beside
            the label; all when None (as in `tfrs.tasks.Retrieval`).
        half_precision: multiply in bfloat16; sums and the softmax itself stay in float32.
    """

    def __init__(
        self,
        temperature: float,
        num_hard_negatives: int | None = None,
        half_precision: bool = False,
    ) -> None:
        super().__init__(temperature=temperature, num_hard_negatives=num_hard_negatives)
        self._dtype = tf.bfloat16 if half_precision else tf.float32

    def call(
        self,
        query_embeddings: tf.Tensor,
        candidate_embeddings: tf.Tensor,
        labels: tf.Tensor,
        sample_weight: tf.Tensor | None = None,
        log_sampling_probability: tf.Tensor | None = None,
        excluded: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Return the mean loss of a batch.

        Args:
            query_embeddings: `[batch, dim]`.
            candidate_embeddings: `[num_candidates, dim]`, each item at most once.
            labels: int32 `[batch]`, rows of `candidate_embeddings`.
            sample_weight: `[batch]`.
            log_sampling_probability: `[num_candidates]`, of each candidate to be among them.
            excluded: int32 `[batch, any]`, rows of candidates that are no negatives of the query,
                such as the items of its own history; -1 stands for none. The label never is.

        Returns:
            Scalar: sum of weighted cross-entropies divided by the batch size.
        """
        batch = tf.shape(labels)[0]
        weight = tf.ones([batch]) if sample_weight is None else sample_weight
        bias = tf.zeros([tf.shape(candidate_embeddings)[0]])
        if log_sampling_probability is not None:
            bias = -log_sampling_probability
        none = tf.zeros([batch, 0], tf.int32)
        excluded = none if excluded is None else excluded

        @tf.custom_gradient
        def loss(queries: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
            value, by_query, by_candidate = self._loss_and_gradients(
                queries, candidates, labels, weight, bias, excluded
            )
            return value, lambda upstream: (upstream * by_query, upstream * by_candidate)

        return loss(query_embeddings, candidate_embeddings)

    @tf.function(reduce_retracing=True)
    def _loss_and_gradients(
        self,
        queries: tf.Tensor,
        candidates: tf.Tensor,
        labels: tf.Tensor,
        weight: tf.Tensor,
        bias: tf.Tensor,
        excluded: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        scaled = tf.cast(candidates / self._temperature, self._dtype)
        num_tiles = (tf.shape(labels)[0] + _TILE - 1) // _TILE
        scale = weight / tf.cast(tf.shape(labels)[0], weight.dtype)
        by_query = tf.TensorArray(
            tf.float32, num_tiles, element_shape=[None, candidates.shape[1]], infer_shape=False
        )
        by_candidate = tf.zeros_like(candidates)
        total = tf.constant(0.0)
        for tile in tf.range(num_tiles):
            rows = slice(tile * _TILE, (tile + 1) * _TILE)
            query = tf.cast(queries[rows], self._dtype)
            logits = tf.cast(tf.matmul(query, scaled, transpose_b=True), tf.float32) + bias
            logits = self._without(logits, labels[rows], excluded[rows])
            logp = tf.nn.log_softmax(logits)
            total -= tf.reduce_sum(scale[rows] * tf.gather(logp, labels[rows], batch_dims=1))
            error = tf.exp(logp) - tf.one_hot(labels[rows], tf.shape(logp)[1])
            error = tf.cast(error * scale[rows, tf.newaxis], self._dtype)
            by_query = by_query.write(tile, tf.cast(tf.matmul(error, scaled), tf.float32))
            by_candidate += tf.cast(tf.matmul(error, query, transpose_a=True), tf.float32)
        return total, by_query.concat(), by_candidate / self._temperature

    def _without(self, logits: tf.Tensor, labels: tf.Tensor, excluded: tf.Tensor) -> tf.Tensor:
        """Mask excluded candidates, and all but the hardest negatives."""
        excluded = tf.where(excluded == labels[:, tf.newaxis], -1, excluded)
        place = tf.cast(tf.where(excluded >= 0), tf.int32)
        pairs = tf.stack([place[:, 0], tf.gather_nd(excluded, place)], axis=1)
        masked = tf.fill([tf.shape(pairs)[0]], _MASKED)
        logits = tf.tensor_scatter_nd_update(logits, pairs, masked)
        if self._num_hard_negatives is None:
            return logits
        is_label = tf.one_hot(labels, tf.shape(logits)[1], on_value=True, off_value=False)
        kept = tf.minimum(self._num_hard_negatives, tf.shape(logits)[1] - 1)
        hardest = tf.math.top_k(tf.where(is_label, _MASKED, logits), kept).values
        return tf.where(is_label | (logits >= hardest[:, -1:]), logits, _MASKED)
