"""Counting baselines: what every model must beat.

They have no parameter to select, so they learn from all that is known before the test window:
training and validation examples, never test ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from recsys.dataset import Interactions
from recsys.popularity import places, popularity_levels
from recsys.session_knn import SessionKnn

#: Shrinks the similarity of rare items (the value of GRU4Rec's item-KNN baseline).
_SMOOTHING = 20.0


class Scorer(Protocol):
    """Scores all candidates for the queries it was made for."""

    def scores(self, rows: slice) -> NDArray[np.float32]:
        """Score every item for the queries of these rows: `[rows, num_items]`, a new array."""
        ...


def counting_baseline(
    name: str, known: Sequence[Interactions], queries: Interactions, num_items: int
) -> Scorer:
    """Make a baseline by its name in `evaluation.baselines` (`als` is made by training.als).

    Args:
        name: popularity, last_viewed, markov, covisitation or vsknn.
        known: splits to learn from.
        queries: split whose histories are scored; its labels are not read.
        num_items: size of the corpus.
    """
    kinds: dict[str, Callable[[Sequence[Interactions], Interactions, int], Scorer]] = {
        "popularity": Popularity,
        "last_viewed": LastViewed,
        "markov": Markov,
        "covisitation": CoVisitation,
        "vsknn": SessionKnn,
    }
    if name not in kinds:
        raise ValueError(f"no counting baseline {name!r}; there are {sorted(kinds)}")
    return kinds[name](known, queries, num_items)


class Popularity:
    """Every query gets the items by how often they are labels."""

    def __init__(
        self, known: Sequence[Interactions], queries: Interactions, num_items: int
    ) -> None:
        self._num_queries = len(queries)
        self._levels = popularity_levels(known, num_items)

    def scores(self, rows: slice) -> NDArray[np.float32]:
        """Score `[rows, num_items]`: the same row for every query."""
        return np.tile(self._levels, (len(range(self._num_queries)[rows]), 1))


class LastViewed:
    """The items of the history, most recent first; then by popularity."""

    def __init__(
        self, known: Sequence[Interactions], queries: Interactions, num_items: int
    ) -> None:
        self._history = queries.history
        self._levels = popularity_levels(known, num_items)

    def scores(self, rows: slice) -> NDArray[np.float32]:
        """Score `[rows, num_items]`: above all popularity levels, by the last position."""
        history = self._history[rows]
        block = np.tile(self._levels, (len(history), 1))
        # Later positions overwrite earlier ones: an item counts where it was viewed last.
        for position in range(history.shape[1]):
            seen = np.flatnonzero(history[:, position] >= 0)
            block[seen, history[seen, position]] = len(self._levels) + position
        return block


class Markov:
    """First-order Markov chain: what followed the last item most often; then by popularity.

    Scores are places, not counts: float32 would lose the popularity beside a large count.
    """

    def __init__(
        self, known: Sequence[Interactions], queries: Interactions, num_items: int
    ) -> None:
        self._levels = popularity_levels(known, num_items)
        self._last = _last_item(queries.history)
        counts = sum(_transitions(split, num_items) for split in known).tocoo()
        place = places(counts.row, counts.data, self._levels[counts.col])
        self._followers = sparse.csr_array(
            ((num_items + place).astype(np.float32), (counts.row, counts.col)), shape=counts.shape
        )

    def scores(self, rows: slice) -> NDArray[np.float32]:
        """Score `[rows, num_items]`: any item that ever followed beats all that never did."""
        last = self._last[rows]
        block = np.tile(self._levels, (len(last), 1))
        queries = np.flatnonzero(last >= 0)
        followers = self._followers[last[queries]].tocoo()
        block[queries[followers.row], followers.col] = followers.data
        return block


class CoVisitation:
    """Item-to-item: the sum of smoothed cosines between the history's items and a candidate.

    Cosine of Linden, Smith and York ("Amazon.com Recommendations", 2003) and Deshpande and Karypis
    ("Item-Based Top-N Recommendation Algorithms", 2004), smoothed as in the item-KNN baseline of
    Hidasi et al. (ICLR 2016). It counts from an item of the history to the label: the
    direction of time is kept. Items without any co-visit follow by popularity.
    """

    def __init__(
        self, known: Sequence[Interactions], queries: Interactions, num_items: int
    ) -> None:
        levels = popularity_levels(known, num_items)
        self._unseen = levels / (levels.max() + 1) - 1
        self._queries = _visits(queries.history, num_items)
        self._similar = _smoothed_cosine(known, num_items)

    def scores(self, rows: slice) -> NDArray[np.float32]:
        """Score `[rows, num_items]`: similarities above 0, popularity within [-1, 0)."""
        similarity: NDArray[np.float32] = (self._queries[rows] @ self._similar).toarray()
        return np.where(similarity > 0, similarity, self._unseen)


def _last_item(history: NDArray[np.int32]) -> NDArray[np.int32]:
    """Most recent corpus row of each history, -1 for an empty one."""
    if history.shape[1] == 0:
        return np.full(len(history), -1, np.int32)
    last = np.maximum((history >= 0).sum(axis=1) - 1, 0)
    return history[np.arange(len(history)), last]


def _transitions(split: Interactions, num_items: int) -> sparse.csr_array:
    last = _last_item(split.history)
    known = (last >= 0) & (split.label >= 0)
    ones = np.ones(np.count_nonzero(known), np.int64)
    pairs = (last[known], split.label[known])
    return sparse.coo_array((ones, pairs), shape=(num_items, num_items)).tocsr()


def _visits(history: NDArray[np.int32], num_items: int) -> sparse.csr_array:
    """Which items each history holds: `[n, num_items]`, 1 however often."""
    rows, positions = np.nonzero(history >= 0)
    ones = np.ones(len(rows), np.float32)
    visits = sparse.coo_array(
        (ones, (rows, history[rows, positions])), shape=(len(history), num_items)
    ).tocsr()
    visits.data[:] = 1
    return visits


def _smoothed_cosine(known: Sequence[Interactions], num_items: int) -> sparse.csr_array:
    """`pairs(i, j) / sqrt((visits(i) + s) (labels(j) + s))`, `[num_items, num_items]`."""
    pairs = sparse.csr_array((num_items, num_items), dtype=np.float32)
    visited = np.zeros(num_items)
    labelled = np.zeros(num_items)
    for split in known:
        rows = np.flatnonzero(split.label >= 0)
        visits = _visits(split.history[rows], num_items)
        ones = np.ones(len(rows), np.float32)
        labels = sparse.coo_array(
            (ones, (np.arange(len(rows)), split.label[rows])), shape=visits.shape
        ).tocsr()
        pairs = pairs + visits.T @ labels
        visited += visits.sum(axis=0)
        labelled += labels.sum(axis=0)
    left = sparse.diags_array(1 / np.sqrt(visited + _SMOOTHING))
    right = sparse.diags_array(1 / np.sqrt(labelled + _SMOOTHING))
    return (left @ pairs @ right).astype(np.float32).tocsr()
