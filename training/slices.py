"""Metrics by slice of the queries: who asks, with how long a history, for how popular an item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.dataset import Corpus, Interactions
from recsys.metrics import per_query

#: First history length of each bucket.
_LENGTHS = {"0": 0, "1": 1, "2-4": 2, "5-9": 5, "10+": 10}


def slices(
    values: Mapping[str, NDArray[np.float64]],
    queries: Interactions,
    ranks: NDArray[np.integer[Any]],
    train: Interactions,
    corpus: Corpus,
) -> dict[str, dict[str, dict[str, float]]]:
    """Means of the metrics by slice and bucket, with the number of `queries` in it.

    - `user`: warm users have a training example, cold ones do not.
    - `history_length`: items of the query's history, which prepare cuts at the feature's length.
    - `item_popularity` of the label: cold without a training event; the others by training labels,
      most popular first: head items hold the first third of the labels, torso the second, tail the
      last. A query with several labels is in the bucket of each, and there only these are
      relevant; their ranks stay those among all items.

    Args:
        values: `[n]` per-query metrics by name.
        queries: `[n]` test queries.
        ranks: `[num_labels]` of their labels.
        train: training examples, which say which users are warm.
        corpus: candidates with their training counts.

    Returns:
        By slice, bucket and metric. Buckets without a query are left out.
    """
    members = {"user": _users(queries, train), "history_length": _lengths(queries)}
    found = {
        name: {bucket: _means(values, rows) for bucket, rows in buckets.items() if rows.any()}
        for name, buckets in members.items()
    }
    tiers = _popularity(queries, corpus)
    return found | {
        "item_popularity": {
            tier: _means_of_labels(values, queries, ranks, labels)
            for tier, labels in tiers.items()
            if labels.any()
        }
    }


def _means(values: Mapping[str, NDArray[np.float64]], rows: NDArray[np.bool_]) -> dict[str, float]:
    means = {metric: float(value[rows].mean()) for metric, value in values.items()}
    return {"queries": float(np.count_nonzero(rows))} | means


def _means_of_labels(
    values: Mapping[str, NDArray[np.float64]],
    queries: Interactions,
    ranks: NDArray[np.integer[Any]],
    labels: NDArray[np.bool_],
) -> dict[str, float]:
    """Means over the queries that have such labels, with these alone as relevant items."""
    splits = np.arange(len(queries) + 1) if queries.splits is None else queries.splits
    counts = np.add.reduceat(labels.astype(np.int64), splits[:-1])
    rows = counts > 0
    ks = sorted({int(metric.split("@")[1]) for metric in values})
    own = per_query(ranks[labels], ks, np.concatenate([[0], np.cumsum(counts[rows])]))
    means = _means(values, rows)
    return means | {name: float(own[name].mean()) for name in means.keys() & own.keys()}


def _users(queries: Interactions, train: Interactions) -> dict[str, NDArray[np.bool_]]:
    warm = np.isin(queries.user_id.astype(bytes), train.user_id.astype(bytes))
    return {"warm": warm, "cold": ~warm}


def _lengths(queries: Interactions) -> dict[str, NDArray[np.bool_]]:
    length = (queries.history >= 0).sum(axis=1)
    bucket = np.searchsorted(list(_LENGTHS.values()), length, side="right") - 1
    return {name: bucket == position for position, name in enumerate(_LENGTHS)}


def _popularity(queries: Interactions, corpus: Corpus) -> dict[str, NDArray[np.bool_]]:
    """Which labels, `[num_labels]`, are of each tier."""
    thirds = popularity_thirds(corpus.labels)
    in_corpus = queries.label >= 0
    warm = in_corpus & (corpus.count[queries.label] > 0)
    third = thirds[queries.label]
    tiers = {name: warm & (third == tier) for tier, name in enumerate(("head", "torso", "tail"))}
    return tiers | {"cold": ~warm}


def popularity_thirds(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tier of each item, `[num_items]`: 0 head, 1 torso, 2 tail, each a third of the labels.

    An item belongs where its first label falls when items are stacked most popular first.

    >>> popularity_thirds(np.array([1, 5, 2, 1, 0]))
    array([2, 0, 1, 2, 2])
    """
    order = np.argsort(-labels, kind="stable")
    before = np.cumsum(labels[order]) - labels[order]
    tiers = np.empty(len(labels), np.int64)
    # Compared in whole labels: 3 * before / total has no rounding to put an item across a border.
    tiers[order] = np.minimum(3 * before // max(int(labels.sum()), 1), 2)
    return tiers
