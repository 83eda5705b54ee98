"""Indexes that are saved with a model: exact search, and ScaNN's approximate search.

What a query is answered never depends on who else is asked for: neither on the size of a batch nor
on how much the others of it want.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from scann.scann_ops.py import scann_ops

from serving_export.searcher import Floats, State, search

#: Each step of effort is so many times the one before: one search does for all queries of a step.
_STEP = math.sqrt(2)
#: Queries that all candidates are scored for together.
_AT_ONCE = 32


class ExactIndex(tf.Module):
    """Dot product with every candidate; stock TensorFlow ops, `batch * num_candidates` floats."""

    def __init__(self, embeddings: Floats) -> None:
        super().__init__()
        self._embeddings = tf.Variable(embeddings, trainable=False, name="embeddings")

    def search(self, queries: tf.Tensor, counts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Find corpus rows (int32) and scores of the best.

        Args:
            queries: `[batch, dim]`.
            counts: wanted by each query, int32 `[batch]`, or `[]` by all.

        Returns:
            Rows and scores, `[batch, min(largest count, num_candidates)]`.
        """
        scores = tf.matmul(queries, self._embeddings, transpose_b=True)
        width = tf.maximum(tf.reduce_max(counts), 1)
        best, rows = tf.math.top_k(scores, tf.minimum(width, tf.shape(scores)[1]))
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

    def search(self, queries: tf.Tensor, counts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Find corpus rows (int32) and scores of about the best.

        Effort grows in steps with the count of each query. Where the leaves that were searched for
        a query hold fewer candidates than it wants, all leaves are searched for it, so that a long
        list is never cut short.

        Args:
            queries: `[batch, dim]`.
            counts: wanted by each query, int32 `[batch]`, or `[]` by all; at least 1.

        Returns:
            Rows and scores, `[batch, min(largest count, num_candidates)]`; row 0 and score NaN
            behind what a query wants, and for one that is not finite.
        """
        handle = scann_ops.tensors_to_scann(*self._state, shared_name=self._shared_name)
        counts = tf.minimum(tf.broadcast_to(counts, tf.shape(queries)[:1]), self._size)
        ask = _Asked(handle, queries, tf.maximum(tf.reduce_max(counts), 1))
        found = self._by_step(ask, counts)
        wanted = tf.range(ask.width) < counts[:, tf.newaxis]
        short = tf.reduce_any(wanted & tf.math.is_nan(found[1]), axis=1)
        # ScaNN fails on a query that is not a number where it scores all, and the batch with it.
        short &= tf.reduce_all(tf.math.is_finite(queries), axis=1)
        rows, scores = tf.cond(
            tf.reduce_any(short),
            lambda: self._everywhere(ask, tf.where(short), found),
            lambda: found,
        )
        return tf.where(wanted, rows, 0), tf.where(wanted, scores, np.nan)

    def _by_step(self, ask: _Asked, counts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Search once for the queries of each step, `[batch, width]`."""
        efforts = tf.constant(self._steps())
        steps = tf.searchsorted(efforts[:, 0], counts)

        def search_each() -> tuple[tf.Tensor, tf.Tensor]:
            distinct, which = tf.unique(steps)

            def search_step(n: tf.Tensor, *found: tf.Tensor) -> tuple[tf.Tensor, ...]:
                return n + 1, *ask.again(tf.where(which == n), efforts[distinct[n]], found)

            _, rows, scores = tf.while_loop(
                lambda n, *_: n < tf.size(distinct),
                search_step,
                (tf.constant(0), *ask.nothing()),
                parallel_iterations=1,
            )
            return rows, scores

        # A single request, and most batches: nothing is taken apart.
        last = tf.reduce_max(steps)
        return tf.cond(
            tf.reduce_min(steps) == last,
            lambda: ask.found(ask.queries, efforts[last]),
            search_each,
        )

    def _everywhere(
        self, ask: _Asked, which: tf.Tensor, found: tuple[tf.Tensor, tf.Tensor]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Score all candidates for some of the queries, `which` is `[n, 1]`."""
        effort = tf.stack([ask.width, self._size, self.effort.num_leaves])

        def search_some(first: tf.Tensor, *found: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return first + _AT_ONCE, *ask.again(which[first : first + _AT_ONCE], effort, found)

        _, rows, scores = tf.while_loop(
            lambda first, *_: first < tf.shape(which)[0],
            search_some,
            (tf.constant(0), *found),
            parallel_iterations=1,
        )
        return rows, scores

    def _steps(self) -> list[list[int]]:
        """Neighbours, candidates that are scored again and leaves, by step; the last finds all."""
        k, size = min(self.effort.k, self._size), self._size
        counts = [k]
        while counts[-1] < size:
            counts.append(min(math.ceil(counts[-1] * _STEP), size))
        return [
            [
                count,
                min(math.ceil(self.effort.reorder * count / k), size),
                min(math.ceil(self.effort.leaves_to_search * count / k), self.effort.num_leaves),
            ]
            for count in counts
        ]


class _Asked(NamedTuple):
    """A batch of queries at a searcher, and how many columns its answer has."""

    handle: tf.Tensor
    queries: tf.Tensor
    width: tf.Tensor

    def nothing(self) -> tuple[tf.Tensor, tf.Tensor]:
        shape = tf.stack([tf.shape(self.queries)[0], self.width])
        return tf.zeros(shape, tf.int32), tf.fill(shape, np.float32(np.nan))

    def found(self, queries: tf.Tensor, effort: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Search with an effort `[3]`, and cut or fill up with NaN to the width."""
        rows, scores = search(self.handle, queries, *tf.unstack(effort))
        missing = [[0, 0], [0, tf.maximum(self.width - tf.shape(rows)[1], 0)]]
        rows = tf.pad(rows[:, : self.width], missing)
        return rows, tf.pad(scores[:, : self.width], missing, constant_values=np.nan)

    def again(
        self, which: tf.Tensor, effort: tf.Tensor, found: tuple[tf.Tensor, ...]
    ) -> tuple[tf.Tensor, ...]:
        """Search for some of the queries, `which` is `[n, 1]`, and put it in place of `found`."""
        parts = self.found(tf.gather(self.queries, which[:, 0]), effort)
        return tuple(
            tf.tensor_scatter_nd_update(whole, which, part)
            for whole, part in zip(found, parts, strict=True)
        )
