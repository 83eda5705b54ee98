"""V-SKNN: what the sessions most like the query's went on to hold.

Ludewig and Jannach, "Evaluation of Session-based Recommendation Algorithms", UMUAI 28, 2018, with
both of its linear weights: of the query's items in the similarity, and of a neighbour by where it
meets the query.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from recsys.dataset import Interactions
from recsys.popularity import places, popularity_levels

#: The neighbours are the 100 most similar of the 1000 most recent sessions that share an item.
_NEIGHBOURS = 100
_SAMPLE = 1000
#: Up to `history length * _SAMPLE` sessions per query are held at a time.
_QUERIES = 64


class SessionKnn:
    """Sum over the neighbours that hold an item of `similarity / step`; then by popularity.

    The item at position p of a query of n items weighs p (an item that comes twice, its last
    position); a session's similarity is the sum over the items it shares. The published weight is
    p / n, which orders the sessions of one query alike; whole numbers add up exactly, so that
    equal sessions are equal. `step` counts back from the query's last item, 1, to the most recent
    one that is shared. Items of the query itself can be recommended.

    Equally similar sessions are preferred by recency. Where `known` has no times, their order is
    random but always the same: then the sample is a random one, as are ties.
    """

    def __init__(
        self, known: Sequence[Interactions], queries: Interactions, num_items: int
    ) -> None:
        self._history = queries.history
        self._levels = popularity_levels(known, num_items)
        self._sessions = known_sessions(known, num_items)
        # The most recent sessions with any of several items are among the most recent with each.
        self._holders = _first_of_each_row(self._sessions.T.tocsr(), _SAMPLE)

    def scores(self, rows: slice) -> NDArray[np.float32]:
        """Score `[rows, num_items]`: any item of a neighbour beats all others."""
        history = self._history[rows]
        block = np.tile(self._levels, (len(history), 1))
        for first in range(0, len(history), _QUERIES):
            neighbours = self._neighbours(history[first : first + _QUERIES])
            found = (neighbours @ self._sessions).tocoo()
            # Sums that differ by their rounding alone are equal as float32.
            place = places(found.row, found.data.astype(np.float32), self._levels[found.col])
            block[first + found.row, found.col] = len(self._levels) + place
        return block

    def _neighbours(self, history: NDArray[np.int32]) -> sparse.csr_array:
        """Weights `similarity / step` of the neighbours, `[queries, num_sessions]`."""
        query, session, position = self._shared(history)
        pair = query * self._sessions.shape[0] + session
        # Neither sum nor maximum asks for an order within a pair.
        order = np.argsort(pair)
        begins = np.flatnonzero(np.diff(pair[order], prepend=-1))
        position = position[order]
        similarity = np.add.reduceat(position, begins)
        latest = np.maximum.reduceat(position, begins)
        query, session = query[order[begins]], session[order[begins]]
        recent = np.flatnonzero(nth_of_row(query) < _SAMPLE)
        order = recent[np.lexsort((session[recent], -similarity[recent], query[recent]))]
        order = order[nth_of_row(query[order]) < _NEIGHBOURS]
        step = (history >= 0).sum(axis=1)[query] - latest + 1
        return sparse.coo_array(
            ((similarity / step)[order], (query[order], session[order])),
            shape=(len(history), self._sessions.shape[0]),
        ).tocsr()

    def _shared(
        self, history: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Query, session and position of every item that the two share."""
        query, position, item = _last_positions(history)
        holders = self._holders[item]
        entry = np.repeat(np.arange(len(item)), np.diff(holders.indptr))
        return query[entry], holders.indices, position[entry]


def known_sessions(known: Sequence[Interactions], num_items: int) -> sparse.csr_array:
    """Which items each session holds, `[num_sessions, num_items]` of ones, most recent first.

    A session is all that one user's examples have in their histories and labels, or, where these
    begin anew (`data.history_scope: session`), what they have from there on.
    """
    session, at, events = _rows_of_sessions(known)
    num_sessions = int(session.max(initial=-1)) + 1
    last = np.full(num_sessions, np.iinfo(np.int64).min)
    np.maximum.at(last, session, at)
    newest_first = np.lexsort((np.random.default_rng(0).permutation(num_sessions), -last))
    place = np.empty_like(newest_first)
    place[newest_first] = np.arange(num_sessions)
    held = sparse.csr_array((num_sessions, num_items), dtype=np.float32)
    # Position by position: histories repeat each other, all their items at once would not fit.
    for items in events.T:
        rows = np.flatnonzero(items >= 0)
        ones = np.ones(len(rows), np.float32)
        pairs = (place[session[rows]], items[rows])
        held = held + sparse.coo_array((ones, pairs), shape=held.shape).tocsr()
    held.data[:] = 1
    return held


def _rows_of_sessions(
    known: Sequence[Interactions],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Session, time and items (history, then label) of every known example."""
    user_id = np.concatenate([split.user_id for split in known]).astype(bytes)
    user = np.unique(user_id, return_inverse=True)[1]
    at = np.concatenate(
        [np.zeros(len(split), np.int64) if split.at is None else split.at for split in known]
    )
    history = np.concatenate([split.history for split in known])
    length = (history >= 0).sum(axis=1)
    events = np.pad(history, ((0, 0), (0, 1)), constant_values=-1)
    events[np.arange(len(events)), length] = np.concatenate([split.label for split in known])
    order = np.lexsort((length, at, user))
    events, length = events[order], length[order]
    # A history that is full no longer shows where its session began; one that was cut begins with
    # an item that the example before it lists, so late that the rest of it fits.
    before = np.vstack([np.full((1, events.shape[1]), -2), events[:-1]])
    rest = np.concatenate([[0], length[:-1] + 1])[:, None] - np.arange(events.shape[1])
    cut = ((before == events[:, :1]) & (rest <= length[:, None])).any(axis=1) & (length > 1)
    begins = (np.diff(events[:, 0], prepend=-1) != 0) & (length < history.shape[1]) & ~cut
    begins |= np.diff(user[order], prepend=-1) != 0
    session = np.empty_like(user)
    session[order] = np.cumsum(begins) - 1
    return session[order], at[order], events


def _first_of_each_row(matrix: sparse.csr_array, most: int) -> sparse.csr_array:
    matrix.sort_indices()
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    kept = np.flatnonzero(nth_of_row(row) < most)
    pairs = (row[kept], matrix.indices[kept])
    return sparse.coo_array((matrix.data[kept], pairs), shape=matrix.shape).tocsr()


def _last_positions(
    history: NDArray[np.int32],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Query, position from 1 and item of the items of each history, each where it comes last."""
    query, column = np.nonzero(history >= 0)
    item = history[query, column]
    order = np.lexsort((column, item, query))
    query, column, item = query[order], column[order], item[order]
    last = (np.diff(query, append=-1) != 0) | (np.diff(item, append=-1) != 0)
    return query[last], column[last] + 1, item[last]


def nth_of_row(row: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many entries of the same row come before each entry; rows are sorted."""
    nth: NDArray[np.int64] = np.arange(len(row)) - np.searchsorted(row, row)
    return nth
