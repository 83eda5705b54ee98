"""Answers that restrictions leave short, completed by exact search over the whole corpus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from serving_export.restrictions import Restrictions

#: Queries that are searched for together: each holds a score of every candidate, and more than one.
_AT_ONCE = 32


class Query(NamedTuple):
    """What the graph knows of a batch of queries.

    Attributes:
        embedding: `[batch, dim]`.
        cold: `[batch]`, whether nothing identifies them.
        excluded: corpus rows, `[batch, any]`, -1 for unknown ids.
        seen: corpus rows of the history, `[batch, length]`, -1 for none and all of a cold query; no
            column where the towers give no `repeat`.
        repeat: what is added to their scores, `[batch, length]`, or None.
    """

    embedding: tf.Tensor
    cold: tf.Tensor
    excluded: tf.Tensor
    seen: tf.Tensor
    repeat: tf.Tensor | None

    def only(self, which: tf.Tensor) -> Query:
        """Some of the queries, `which` int `[n]`."""
        return Query(*(None if part is None else tf.gather(part, which) for part in self))


class Completion(tf.Module):
    """Finds by exact search what an index has left out; holds a few `[32, N]` at a time.

    Args:
        restrictions: what may be returned.
        embeddings: of the candidates, a variable `[N, dim]`.
        prior: what cold queries are answered with, a variable `[N]` by corpus row.
    """

    def __init__(
        self, restrictions: Restrictions, embeddings: tf.Variable, prior: tf.Variable
    ) -> None:
        super().__init__()
        self._restrictions = restrictions
        self._embeddings = embeddings
        self._prior = prior

    def complete(
        self,
        query: Query,
        request: Mapping[str, tf.Tensor],
        found: tuple[tf.Tensor, tf.Tensor],
        floor: tf.Tensor,
        wanted: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Search for the queries that have got fewer than they want; for none if all have.

        Items of the history are candidates without being fetched, so one may stand in a place that
        belongs to an item which was not fetched: what is below `floor` does not count.

        Args:
            query: `[batch]`.
            request: with the inputs of the filters.
            found: rows and scores `[batch, k]`, best first, -inf at the end where there are fewer.
            floor: `[batch]`, no item that was not fetched has a better score.
            wanted: `[batch]`, places that matter; 0 where everything was fetched.

        Returns:
            Rows and scores `[batch, k]`; those of full answers are what they were.
        """
        rows, scores = found
        short = tf.math.is_inf(scores) | (scores < floor[:, tf.newaxis])
        short &= tf.range(tf.shape(scores)[1]) < wanted[:, tf.newaxis]
        short = tf.reduce_any(short, axis=1)
        return tf.cond(
            tf.reduce_any(short),
            lambda: self._replaced(query, request, rows, scores, tf.where(short)),
            lambda: (rows, scores),
        )

    def _replaced(
        self,
        query: Query,
        request: Mapping[str, tf.Tensor],
        rows: tf.Tensor,
        scores: tf.Tensor,
        which: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        def replace_some(
            first: tf.Tensor, rows: tf.Tensor, scores: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            some = which[first : first + _AT_ONCE]
            own = {n: tf.gather(request[n], some[:, 0]) for n in self._restrictions.inputs()}
            all_scores = self._scores(query.only(some[:, 0]), own)
            best, best_rows = tf.math.top_k(all_scores, tf.shape(scores)[1])
            rows = tf.tensor_scatter_nd_update(rows, some, best_rows)
            return first + _AT_ONCE, rows, tf.tensor_scatter_nd_update(scores, some, best)

        _, rows, scores = tf.while_loop(
            lambda first, *_: first < tf.shape(which)[0],
            replace_some,
            (tf.constant(0), rows, scores),
            parallel_iterations=1,
        )
        return rows, scores

    def _scores(self, query: Query, asked: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Score of every candidate, `[n, N]`; -inf for what may not be returned."""
        scores = tf.matmul(query.embedding, self._embeddings, transpose_b=True)
        if query.repeat is not None:
            added = tf.gather_nd(query.repeat, tf.where(query.seen >= 0))
            scores = tf.tensor_scatter_nd_add(scores, _cells(query.seen), added)
        scores = tf.where(query.cold[:, tf.newaxis], self._prior, scores)
        everything = tf.range(tf.size(self._prior))[tf.newaxis]
        scores = tf.where(self._restrictions.allow(asked, everything), scores, -np.inf)
        excluded = _cells(query.excluded)
        nothing = tf.fill(tf.shape(excluded)[:1], np.float32(-np.inf))
        return tf.tensor_scatter_nd_update(scores, excluded, nothing)


def _cells(rows: tf.Tensor) -> tf.Tensor:
    """Query and corpus row, `[n, 2]`, of what a list of rows by query holds, without -1."""
    places = tf.where(rows >= 0)
    return tf.stack([places[:, 0], tf.cast(tf.gather_nd(rows, places), tf.int64)], axis=1)
