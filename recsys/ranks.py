"""Rank the labels of every query among all candidates: exact, block by block, memory bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tqdm import tqdm

from recsys.baselines import Scorer
from recsys.dataset import Interactions
from recsys.metrics import rank_of_label

#: Bytes of one block of scores. Far below what memory allows: a block that stays near the
#: processor's cache is scored and ranked three times faster than one of 256 MB.
BLOCK_BYTES = 16 * 2**20
#: Scorers need memory per query too, however small the corpus is.
_MAX_QUERIES = 2048


@dataclass(frozen=True, slots=True)
class Ranking:
    """What one scorer did with the queries.

    Attributes:
        rank: `[num_labels]` rank of each label, 0 if it cannot be retrieved.
        recommended: `[n, k]` corpus rows of the best k, -1 where fewer are not excluded.
    """

    rank: NDArray[np.int32]
    recommended: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Candidates:
    """What retrieval finds for a block of queries, best first.

    Attributes:
        queries: which of the queries these are.
        items: `[rows, k]` corpus rows, -1 where fewer are not excluded.
        scores: `[rows, k]`, -inf for no item.
    """

    queries: slice
    items: NDArray[np.int32]
    scores: NDArray[np.float32]


class DotProduct:
    """Scores of embedded queries against embedded candidates.

    Args:
        queries: `[n, dim]`.
        candidates: `[num_items, dim]`.
        repeat: `[n, length]`, added to the scores of the items of the history; None for none.
        history: `[n, length]`, corpus rows of these items, -1 for none.
    """

    def __init__(
        self,
        queries: NDArray[np.float32],
        candidates: NDArray[np.float32],
        repeat: NDArray[np.float32] | None = None,
        history: NDArray[np.int32] | None = None,
    ) -> None:
        self.candidates = candidates
        self._queries = queries
        self._candidates = candidates.T.copy()
        self._repeat = repeat
        self._history = history

    def scores(self, rows: slice) -> NDArray[np.float32]:
        """Score `[rows, num_items]`."""
        scores: NDArray[np.float32] = self._queries[rows] @ self._candidates
        if self._repeat is not None and self._history is not None:
            query, place = np.nonzero(self._history[rows] >= 0)
            items = self._history[rows][query, place]
            # Unbuffered: an item that was seen twice gets both scores.
            np.add.at(scores, (query, items), self._repeat[rows][query, place])
        return scores


def rank_queries(
    name: str, scorer: Scorer, queries: Interactions, num_items: int, k: int, seed: int
) -> Ranking:
    """Score, exclude, rank the labels and list the k best items of every query.

    Ties of the labels are broken at random, the same way for every scorer and any block size. Ties
    within the lists, which only coverage and novelty read, go to the lower corpus row.

    Args:
        name: of the scorer, for progress and log.
        scorer: made for these queries.
        queries: `[n]`, with their labels and exclusions.
        num_items: size of the corpus.
        k: length of the lists.
        seed: of the tie-break.
    """
    depth = min(k, num_items)
    uniform = np.random.default_rng(seed).random(len(queries.label))
    splits = np.arange(len(queries) + 1) if queries.splits is None else queries.splits
    rank = np.zeros(len(queries.label), np.int32)
    recommended = np.full((len(queries), depth), -1, np.int32)
    for rows in _blocks(name, len(queries), num_items):
        scores = scorer.scores(rows)
        _exclude(scores, queries, rows)
        begins = splits[rows.start : rows.stop + 1]
        own = slice(begins[0], begins[-1])
        rank[own] = rank_of_label(scores, queries.label[own], uniform[own], begins - begins[0])
        recommended[rows] = _top(scores, depth)
    return Ranking(rank, recommended)


def candidate_lists(
    name: str, scorer: Scorer, queries: Interactions, num_items: int, k: int
) -> Iterator[Candidates]:
    """Yield the k best candidates of all queries in their order, a block of queries at a time.

    Args:
        name: of the scorer, for progress.
        scorer: made for these queries.
        queries: `[n]`, with their exclusions.
        num_items: size of the corpus.
        k: length of the lists; shorter where the corpus is smaller.
    """
    depth = min(k, num_items)
    for rows in _blocks(name, len(queries), num_items):
        scores = scorer.scores(rows)
        _exclude(scores, queries, rows)
        items = _top(scores, depth)
        best = np.take_along_axis(scores, np.maximum(items, 0), axis=1)
        yield Candidates(rows, items, np.where(items < 0, -np.inf, best).astype(np.float32))


def _blocks(name: str, num_queries: int, num_items: int) -> Iterator[slice]:
    size = max(1, min(_MAX_QUERIES, BLOCK_BYTES // (4 * num_items)))
    with tqdm(total=num_queries, desc=name, unit=" queries", disable=None, leave=False) as bar:
        for first in range(0, num_queries, size):
            rows = slice(first, min(first + size, num_queries))
            yield rows
            bar.update(rows.stop - rows.start)


def _exclude(scores: NDArray[np.float32], queries: Interactions, rows: slice) -> None:
    """Set the scores of each query's exclusions to -inf, in place."""
    if queries.exclusions is None:
        return
    flat, splits = queries.exclusions
    items = flat[splits[rows.start] : splits[rows.stop]]
    query = np.repeat(np.arange(len(scores)), np.diff(splits[rows.start : rows.stop + 1]))
    known = items >= 0
    scores[query[known], items[known]] = -np.inf


def _top(scores: NDArray[np.float32], k: int) -> NDArray[np.int32]:
    """Corpus rows of the k best, `[rows, k]`, -1 for excluded ones."""
    values, items = tf.math.top_k(scores, k)
    return np.where(np.isneginf(values.numpy()), -1, items.numpy())
