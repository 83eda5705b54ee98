"""What is known of an item at the beginning of a window: how popular it is, and of late, and when.

A statistic is point-in-time correct for a query if nothing in it happened after the query. Here it
is also what serving has: a model is exported at one moment and asked later, with the statistics of
that moment. So all queries of a window read those of the window's beginning, in training, in
evaluation and in serving alike. Statistics that run up to each query would be fresher in training
than they ever are in serving, where no one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.dataset import Interactions

#: Columns; those after the first need time stamps.
STATISTICS = ("popularity", "recent_popularity", "days_since_label", "never_labelled")
_RECENT_SHARE = 0.2
_PRIOR_SHOWS = 10.0
_MICROSECONDS_PER_DAY = 86_400e6


def item_statistics(
    known: Sequence[Interactions], num_items: int, timed: bool
) -> NDArray[np.float32]:
    """Statistics of all items by the labels that are known.

    `popularity` is the log of the item's share of the labels, by weight, over that of an average
    item, add-one smoothed; `recent_popularity` the same of the latest fifth of the labels. Shares
    do not grow with the length of the window. `days_since_label` counts from the item's last label
    to the last of all, as log1p; an item without labels gets the days that all labels span.

    Args:
        known: labels before the window, with `at` and `weight`.
        num_items: size of the corpus.
        timed: whether `at` is a time; otherwise there is only `popularity`.

    Returns:
        `[num_items, 4]`, `[num_items, 1]` without time: columns as `STATISTICS` names them.
    """
    label = np.concatenate([split.label for split in known])
    weight = np.concatenate([split.weight for split in known])[label >= 0]
    moments = [np.zeros(len(s.label), np.int64) if s.at is None else s.at for s in known]
    at = np.concatenate(moments)[label >= 0]
    label = label[label >= 0]
    columns = [_log_share(label, weight, num_items)]
    if timed:
        recent = at >= np.quantile(at, 1 - _RECENT_SHARE) if len(at) else np.zeros(0, bool)
        columns.append(_log_share(label[recent], weight[recent], num_items))
        columns += _recency(label, at, num_items)
    return np.stack(columns, axis=1).astype(np.float32)


def click_statistics(
    shown: NDArray[np.integer[Any]], clicked: NDArray[np.integer[Any]]
) -> NDArray[np.float32]:
    """Statistics of all items by the lists that were shown before the window.

    How much more often than others an item is clicked where it is shown, as the difference of log
    odds, with ten shows of the mean rate added; and the log of its share of all shows over that of
    an average item, add-one smoothed.

    Args:
        shown: `[num_items]` times.
        clicked: `[num_items]` times.

    Returns:
        `[num_items, 2]`.
    """
    rate = (clicked.sum() + 1) / (shown.sum() + 2)
    taken = clicked + _PRIOR_SHOWS * rate
    left = shown - clicked + _PRIOR_SHOWS * (1 - rate)
    odds = np.log(taken / left) - np.log(rate / (1 - rate))
    share = np.log((shown + 1) * len(shown) / (shown.sum() + len(shown)))
    return np.stack([odds, share], axis=1).astype(np.float32)


def standardised(
    statistics: NDArray[np.float32], reference: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Statistics by mean and standard deviation of the reference, both `[num_items, any]`."""
    spread = reference.std(axis=0)
    scaled: NDArray[np.float32] = (statistics - reference.mean(axis=0)) / np.where(
        spread > 0, spread, 1
    )
    return scaled.astype(np.float32)


def _log_share(
    label: NDArray[np.int32], weight: NDArray[np.float32], num_items: int
) -> NDArray[np.float64]:
    counts = np.bincount(label, weight, num_items)
    return np.log((counts + 1) * num_items / (counts.sum() + num_items))


def _recency(
    label: NDArray[np.int32], at: NDArray[np.int64], num_items: int
) -> list[NDArray[np.float64]]:
    first, last = (at.min(), at.max()) if len(at) else (0, 0)
    latest = np.full(num_items, first, np.int64)
    np.maximum.at(latest, label, at)
    never = np.ones(num_items)
    never[label] = 0
    return [np.log1p((last - latest) / _MICROSECONDS_PER_DAY), never]
