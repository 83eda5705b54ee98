"""Indexes that are saved with a model: exact search, and ScaNN's approximate search."""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf
from scann.scann_ops.py import scann_ops

from serving_export.searcher import Floats, State, search


class ExactIndex(tf.Module):
    """Dot product with every candidate; stock TensorFlow ops, `batch * num_candidates` floats."""

    def __init__(self, embeddings: Floats) -> None:
        super().__init__()
        self._embeddings = tf.Variable(embeddings, trainable=False, name="embeddings")

    def search(self, queries: tf.Tensor, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Find corpus rows (int32) and scores of the best `count`, both `[batch, <= count]`."""
        scores = tf.matmul(queries, self._embeddings, transpose_b=True)
        best, rows = tf.math.top_k(scores, tf.minimum(count, tf.shape(scores)[1]))
        return rows, best


@dataclass(frozen=True, slots=True)
class Effort:
    """What a search for `k` neighbours looks at; a search for more looks at more.

    Attributes:
        k: neighbours.
        num_leaves: that there are.
        leaves_to_search: of them.
        reorder: candidates that are scored again before the best `k` are taken.
    """

    k: int
    num_leaves: int
    leaves_to_search: int
    reorder: int


class ScannIndex(tf.Module):
    """A ScaNN searcher, kept as tensors, that finds any number of neighbours asked for."""

    def __init__(self, state: State, num_candidates: int, effort: Effort) -> None:
        super().__init__()
        self._size = num_candidates
        self.effort = effort
        # Without a name each call site would hold a searcher of its own; a name by content is
        # shared by the signatures of one model and never by two models in one process.
        self._shared_name = "scann-" + state.digest()
        self._state = [tf.Variable(tensor, trainable=False) for tensor in state]

    def search(self, queries: tf.Tensor, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Find corpus rows (int32) and scores of about the best `count` (at least 1).

        Effort grows in proportion to `count`. Where the leaves that were searched hold fewer than
        `count` candidates, all leaves are searched, so that a long list is never cut short.

        Returns:
            Rows and scores, `[batch, min(count, num_candidates)]` (no columns if batch is 0).
        """
        handle = scann_ops.tensors_to_scann(*self._state, shared_name=self._shared_name)
        count = tf.minimum(count, self._size)
        times = tf.maximum(1.0, tf.cast(count, tf.float32) / self.effort.k)
        rows, scores = search(
            handle, queries, count, self._scaled(self.effort.reorder, times, self._size),
            self._scaled(self.effort.leaves_to_search, times, self.effort.num_leaves),
        )  # fmt: skip
        short = tf.logical_or(
            tf.shape(rows)[1] < count, tf.reduce_any(tf.math.is_nan(scores), axis=None)
        )
        return tf.cond(
            short,
            lambda: search(handle, queries, count, self._size, self.effort.num_leaves),
            lambda: (rows, scores),
        )

    @staticmethod
    def _scaled(effort: int, times: tf.Tensor, most: int) -> tf.Tensor:
        return tf.minimum(tf.cast(tf.math.ceil(effort * times), tf.int32), most)
