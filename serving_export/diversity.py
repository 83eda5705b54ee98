"""Maximal marginal relevance inside the served graph, and its check in NumPy.

Carbonell and Goldstein, "The use of MMR, diversity-based reranking for reordering documents and
producing summaries", SIGIR 1998: the next item is the one with the most

    relevance * r - (1 - relevance) * largest likeness to an item above.

Likeness is the cosine of item embeddings. Scores have no scale of their own, so `r` is the score
within its query's pool, the best being 1 and the worst 0.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys import list_config

Floats = NDArray[np.float32]

#: Likeness before there is an item above: that of opposites, the least there is.
_LEAST = -1.0
_TOLERANCE = 1e-5


class Diversity(tf.Module):
    """Orders the best of each query by maximal marginal relevance.

    Args:
        settings: weight of relevance, size of the pool.
        embeddings: of the candidates, a variable `[N, dim]`.
    """

    def __init__(self, settings: list_config.Diversity, embeddings: tf.Variable) -> None:
        super().__init__()
        self.pool = settings.pool
        self._relevance = settings.relevance
        self._embeddings = embeddings

    def arranged(
        self, rows: tf.Tensor, scores: tf.Tensor, k: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Choose the first `k` of the pool; what is not chosen follows in the order that it had.

        Args:
            rows: corpus rows `[batch, n]`.
            scores: `[batch, n]`, best first, -inf at the end for none.
            k: int32 `[]`, places that matter.

        Returns:
            Rows and their scores, `[batch, n]`, no longer sorted by score.
        """
        width = tf.minimum(self.pool, tf.shape(rows)[1])
        place = self._places(rows[:, :width], scores[:, :width], tf.minimum(k, width))
        order = tf.argsort(place, axis=1, stable=True)
        after = tf.range(width, tf.shape(rows)[1])[tf.newaxis]
        order = tf.concat([order, tf.tile(after, [tf.shape(rows)[0], 1])], axis=1)
        return tf.gather(rows, order, batch_dims=1), tf.gather(scores, order, batch_dims=1)

    def _places(self, rows: tf.Tensor, scores: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
        """Place of each candidate after `steps` were chosen, `[batch, pool]`."""
        vectors = tf.math.l2_normalize(tf.gather(self._embeddings, rows), axis=2)
        width = tf.shape(rows)[1]
        found = tf.math.is_finite(scores)
        relevance = self._relevance * _within(scores, found)

        def choose(
            step: tf.Tensor, place: tf.Tensor, nearest: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            value = relevance - (1 - self._relevance) * nearest
            free = found & (place >= width)
            best = tf.argmax(tf.where(free, value, -np.inf), axis=1, output_type=tf.int32)
            is_best = tf.range(width) == best[:, tf.newaxis]
            # Where nothing is free, the best is no choice.
            place = tf.where(is_best & free, step, place)
            likeness = tf.linalg.matvec(vectors, tf.gather(vectors, best, batch_dims=1))
            return step + 1, place, tf.maximum(nearest, likeness)

        # Places behind all that can be chosen, in the order of scores.
        last = tf.zeros_like(rows) + tf.range(width, 2 * width)
        _, place, _ = tf.while_loop(
            lambda step, *_: step < steps,
            choose,
            (tf.constant(0), last, tf.fill(tf.shape(scores), _LEAST)),
        )
        return place


def _within(scores: tf.Tensor, found: tf.Tensor) -> tf.Tensor:
    """Scores between those of the worst and best that was found, `[batch, pool]`; 0 for none."""
    least = tf.reduce_min(tf.where(found, scores, np.inf), axis=1, keepdims=True)
    most = tf.reduce_max(tf.where(found, scores, -np.inf), axis=1, keepdims=True)
    return tf.where(found, tf.math.divide_no_nan(scores - least, most - least), 0.0)


def follows(
    settings: list_config.Diversity, scores: Floats, embeddings: Floats, rows: NDArray[np.int_]
) -> NDArray[np.bool_]:
    """Tell which places of an answer hold what the rule may choose there, given those above.

    Step by step, as one tie that is broken otherwise changes all that comes after.

    Args:
        settings: weight of relevance, size of the pool.
        scores: of all candidates, `[n, N]`, -inf for what may not be returned.
        embeddings: of the candidates, `[N, dim]`.
        rows: corpus rows of the answer, `[n, k]`, -1 for none.

    Returns:
        `[n, k]`. A place behind the pool has to hold the next best score; a place without an item
        is right where nothing is left.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, : max(settings.pool, rows.shape[1])]
    sorted_scores = np.take_along_axis(scores, order, axis=1)
    pool, best = order[:, : settings.pool], sorted_scores[:, : settings.pool]
    own = np.where(rows < 0, -np.inf, np.take_along_axis(scores, np.maximum(rows, 0), axis=1))
    with np.errstate(invalid="ignore"):
        same = np.abs(own - sorted_scores[:, : rows.shape[1]]) <= _TOLERANCE * _size(own)
    right = same | ((rows < 0) & ~np.isfinite(sorted_scores[:, : rows.shape[1]]))
    vectors = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    pooled = vectors[pool]
    relevance, tolerance = _relevance(settings.relevance, best)
    free, nearest = np.isfinite(best), np.full(best.shape, _LEAST, np.float32)
    for step in range(min(rows.shape[1], pool.shape[1])):
        row = rows[:, step]
        value = np.where(free, relevance - (1 - settings.relevance) * nearest, -np.inf)
        is_own = (pool == row[:, np.newaxis]) & free
        most = value.max(axis=1) - tolerance
        chosen = np.where(is_own, value, -np.inf).max(axis=1)
        right[:, step] = np.where(free.any(axis=1), is_own.any(axis=1) & (chosen >= most), row < 0)
        free &= ~is_own
        likeness = np.einsum("npd,nd->np", pooled, vectors[np.maximum(row, 0)])
        nearest = np.where(row[:, np.newaxis] >= 0, np.maximum(nearest, likeness), nearest)
    return right


def _size(scores: Floats) -> Floats:
    return np.maximum(1, np.abs(np.where(np.isfinite(scores), scores, 0)))


def _relevance(weight: float, best: Floats) -> tuple[Floats, Floats]:
    """Weighted scores between worst and best, `[n, pool]`, and what rounding may change, `[n]`."""
    found = np.isfinite(best)
    least = np.where(found, best, np.inf).min(axis=1, keepdims=True)
    most = np.where(found, best, -np.inf).max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        span = np.where(most > least, most - least, 1.0)
        relevance = weight * np.where(found, (best - least) / span, 0.0)
    tolerance = _TOLERANCE * (1 + 2 * weight * _size(best).max(axis=1) / span[:, 0])
    return relevance.astype(np.float32), tolerance.astype(np.float32)
