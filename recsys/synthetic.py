"""Planted clickstream: tests know what a model must find in it, because it was put there.

Items form a ring of clusters. A session starts at an item drawn by a Zipf law; each click goes on
to the planted successor of the last one with probability `predictability`, and to an item of the
same cluster otherwise. The best possible hit rate at 1 is therefore close to `predictability`, that
of counting popularity close to the share of the most popular item. With several moods each session
has one of as many successors of an item: which one, only the clicks before the last tell. (The idea
is that of `spotlight.datasets.synthetic`.)
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

_START = datetime(2024, 1, 1, tzinfo=UTC)
_SPAN = timedelta(days=20)
CLICKS_PER_SESSION = 6


@dataclass(frozen=True, slots=True)
class Clickstream:
    """Planted clicks as columns, one entry per click, ordered by session and time.

    Attributes:
        user: `[n]` user numbers.
        item: `[n]` item numbers.
        clicked_at: `[n]` times.
        successor: `[num_moods, num_items]` the planted next item of each item.
        cluster: `[num_items]` the cluster of each item.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    clicked_at: list[datetime]
    successor: NDArray[np.int64]
    cluster: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.user)


def clickstream(
    num_sessions: int = 500,
    num_items: int = 60,
    num_clusters: int = 6,
    predictability: float = 0.8,
    num_moods: int = 1,
    seed: int = 0,
) -> Clickstream:
    """Plant sessions of equal length, spread evenly over twenty days; each user has two sessions.

    >>> clicks = clickstream(num_sessions=3, predictability=1.0)
    >>> bool((clicks.item[1:6] == clicks.successor[0, clicks.item[:5]]).all())
    True
    """
    rng = np.random.default_rng(seed)
    cluster = np.arange(num_items) % num_clusters
    successor = np.stack([_successors(cluster, rng) for _ in range(num_moods)])
    popularity = 1 / np.arange(1, num_items + 1)
    popularity /= popularity.sum()
    items = np.empty((num_sessions, CLICKS_PER_SESSION), np.int64)
    items[:, 0] = rng.choice(num_items, num_sessions, p=popularity)
    mood = rng.integers(num_moods, size=num_sessions)
    for position in range(1, CLICKS_PER_SESSION):
        last = items[:, position - 1]
        stray = _same_cluster(last, num_items, num_clusters, rng)
        follows = rng.random(num_sessions) < predictability
        items[:, position] = np.where(follows, successor[mood, last], stray)
    step = _SPAN / num_sessions
    times = [
        _START + session * step + timedelta(seconds=position)
        for session in range(num_sessions)
        for position in range(CLICKS_PER_SESSION)
    ]
    users = np.repeat(np.arange(num_sessions) % max(1, num_sessions // 2), CLICKS_PER_SESSION)
    return Clickstream(users, items.ravel(), times, successor, cluster)


def _successors(cluster: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """One cycle through the items of each cluster, in random order."""
    successor = np.empty(len(cluster), np.int64)
    for number in np.unique(cluster):
        cycle = rng.permutation(np.flatnonzero(cluster == number))
        successor[cycle] = np.roll(cycle, -1)
    return successor


def _same_cluster(
    items: NDArray[np.int64], num_items: int, num_clusters: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    steps = rng.integers(1, num_items // num_clusters, len(items))
    return (items + steps * num_clusters) % num_items
