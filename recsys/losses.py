"""The retrieval loss: softmax over sampled or all candidates, as a `tfrs.tasks.Retrieval`."""

from __future__ import annotations

import tensorflow as tf
import tensorflow_recommenders as tfrs

_MASKED = -1e9


class SampledSoftmax(tfrs.tasks.Retrieval):
    """Softmax over the labels of the batch and uniformly drawn candidates, corrected by logQ.

    A candidate that is drawn often would be punished often; subtracting the log of the expected
    number of times it is drawn makes the sampled softmax an unbiased view of the full one (Yi et
    al., "Sampling-Bias-Corrected Neural Modeling", RecSys 2019). The uniform draws let the model
    see rare items as negatives (Yang et al., "Mixed Negative Sampling", WWW 2020). Unlike
    `tfrs.layers.loss.SamplingProbablityCorrection`, probabilities are never clipped: its floor of
    1e-6 is wrong for catalogues beyond a million items.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__(temperature=temperature)

    def call(
        self,
        query_embeddings: tf.Tensor,
        candidate_embeddings: tf.Tensor,
        candidate_ids: tf.Tensor,
        log_expected_draws: tf.Tensor,
        sample_weight: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Return the mean loss of a batch.

        Args:
            query_embeddings: `[batch, dim]`.
            candidate_embeddings: `[batch + num_negatives, dim]`; row i is the label of query i.
            candidate_ids: `[batch + num_negatives]`; equal ids are the same item.
            log_expected_draws: `[batch + num_negatives]` log of how often each candidate is
                expected among all of them.
            sample_weight: `[batch]`.

        Returns:
            Scalar: sum of weighted cross-entropies divided by the batch size.
        """
        logits = tf.matmul(query_embeddings, candidate_embeddings, transpose_b=True)
        logits = logits / self._temperature - log_expected_draws
        labels = tf.range(tf.shape(query_embeddings)[0])
        hits = tf.equal(tf.gather(candidate_ids, labels)[:, tf.newaxis], candidate_ids)
        diagonal = tf.equal(labels[:, tf.newaxis], tf.range(tf.shape(candidate_ids)[0]))
        logits = tf.where(hits & ~diagonal, _MASKED, logits)
        return _mean_cross_entropy(logits, labels, sample_weight)


class FullSoftmax(tfrs.tasks.Retrieval):
    """Softmax over the whole corpus: exact, and the better choice while it fits."""

    def __init__(self, temperature: float) -> None:
        super().__init__(temperature=temperature)

    def call(
        self,
        query_embeddings: tf.Tensor,
        candidate_embeddings: tf.Tensor,
        labels: tf.Tensor,
        sample_weight: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Return the mean loss of a batch.

        Args:
            query_embeddings: `[batch, dim]`.
            candidate_embeddings: `[num_items, dim]`.
            labels: `[batch]` rows of `candidate_embeddings`.
            sample_weight: `[batch]`.
        """
        logits = tf.matmul(query_embeddings, candidate_embeddings, transpose_b=True)
        return _mean_cross_entropy(logits / self._temperature, labels, sample_weight)


def _mean_cross_entropy(
    logits: tf.Tensor, labels: tf.Tensor, sample_weight: tf.Tensor | None
) -> tf.Tensor:
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    if sample_weight is not None:
        losses *= sample_weight
    return tf.reduce_mean(losses)
