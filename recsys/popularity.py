"""How often items are labels: the scores of the simplest baseline, and the tie-break of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.dataset import Interactions


def popularity_levels(known: Sequence[Interactions], num_items: int) -> NDArray[np.float32]:
    """Popularity as `[num_items]` integers below num_items: equal label counts, equal levels."""
    counts = sum(
        (np.bincount(split.label[split.label >= 0], minlength=num_items) for split in known),
        np.zeros(num_items, np.int64),
    )
    return np.unique(counts, return_inverse=True)[1].astype(np.float32)


def places(
    rows: NDArray[np.integer[Any]],
    values: NDArray[Any],
    levels: NDArray[np.float32],
) -> NDArray[np.int64]:
    """Place of each entry among those of its row, by value, then by popularity.

    Places stand for values where a score has to be float32: beside a large value it would have no
    room left for the popularity that breaks ties.

    Args:
        rows: `[n]` query or item that the entry belongs to.
        values: `[n]` what decides.
        levels: `[n]` popularity of the entry's item.

    Returns:
        `[n]` places from 0, the lowest; entries equal in value and level have equal places.

    >>> places(np.array([0, 0, 0, 1]), np.array([5, 7, 5, 1]), np.array([2, 0, 1, 0])).tolist()
    [1, 2, 0, 0]
    """
    order = np.lexsort((levels, values, rows))
    row, value, level = rows[order], values[order], levels[order]
    new_row = np.diff(row, prepend=-1) != 0
    higher = new_row | (np.diff(value, prepend=-1) != 0) | (np.diff(level, prepend=-1) != 0)
    place = np.cumsum(higher)
    place -= place[np.flatnonzero(new_row)][np.cumsum(new_row) - 1]
    found = np.empty_like(place)
    found[order] = place
    return found
