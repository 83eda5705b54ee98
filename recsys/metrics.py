"""Ranking metrics at k, per query, from the rank of what was clicked among all candidates.

A rank counts from 1; rank 0 says that the label cannot be retrieved: it is not in the corpus, or
it is excluded. Ranks come from the whole corpus; sampled candidates order models differently
(Krichene and Rendle, "On Sampled Metrics for Item Recommendation", KDD 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def per_query(
    ranks: NDArray[np.integer[Any]],
    ks: Sequence[int],
    num_relevant: NDArray[np.integer[Any]] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Recall, hit rate, NDCG and MRR at each k, one value in [0, 1] per query.

    With one relevant item per query recall equals hit rate. Recall divides by all relevant items,
    also where they are more than k; the ideal DCG of NDCG has `min(k, num_relevant)` of them
    (Järvelin and Kekäläinen, "Cumulated Gain-Based Evaluation of IR Techniques", 2002).

    Args:
        ranks: `[n]`, or `[n, m]` with the ranks of up to m relevant items, filled up with 0.
        ks: depths of the list.
        num_relevant: `[n]` relevant items of each query, m if not given.

    Returns:
        `[n]` values by name, such as `ndcg@10`.

    Raises:
        ValueError: a query has no relevant item, so that its recall is undefined.

    >>> {name: values.tolist() for name, values in per_query(np.array([1, 2, 3, 0]), [2]).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'recall@2': [1.0, 1.0, 0.0, 0.0], 'hit_rate@2': [1.0, 1.0, 0.0, 0.0],
     'ndcg@2': [1.0, 0.6309297535714575, 0.0, 0.0], 'mrr@2': [1.0, 0.5, 0.0, 0.0]}
    >>> per_query(np.array([[1, 4]]), [3])["recall@3"]
    array([0.5])
    """
    table = ranks[:, None] if ranks.ndim == 1 else ranks
    relevant = np.full(len(table), table.shape[1]) if num_relevant is None else num_relevant
    if np.any(relevant < 1):
        raise ValueError("every query needs at least one relevant item; drop those without")
    filled = np.maximum(table, 1)
    ideal = np.cumsum(1 / np.log2(np.arange(max(ks)) + 2))
    metrics = {}
    for k in ks:
        hit = (table > 0) & (table <= k)
        gain = np.sum(hit / np.log2(filled + 1), axis=1)
        metrics[f"recall@{k}"] = hit.sum(axis=1) / relevant
        metrics[f"hit_rate@{k}"] = hit.any(axis=1).astype(np.float64)
        metrics[f"ndcg@{k}"] = gain / ideal[np.minimum(relevant, k) - 1]
        metrics[f"mrr@{k}"] = np.max(hit / filled, axis=1)
    return metrics


def rank_of_label(
    scores: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    uniform: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Rank of each query's label by its id, ties broken uniformly at random.

    A scorer that gives every item the same score so ranks labels at chance level instead of first
    (or by corpus order, which is popularity).

    Args:
        scores: `[n, num_items]`; -inf where a candidate is excluded.
        labels: `[n]` corpus rows, -1 for an item that is not in the corpus.
        uniform: `[n]` random numbers in [0, 1), one per query, that place it among its ties.

    Returns:
        `[n]` ranks from 1; 0 where the label is excluded, not in the corpus, or scored NaN.

    >>> scores = np.array([[0.3, 0.2, 0.1], [0.5, 0.5, 0.5], [-np.inf, 0.0, 0.0]])
    >>> rank_of_label(scores, np.array([1, 0, 0]), np.array([0.9, 0.9, 0.9]))
    array([2, 3, 0])
    """
    own = scores[np.arange(len(labels)), np.maximum(labels, 0)]
    own = np.where(labels >= 0, own, np.nan)[:, None].astype(scores.dtype)
    greater = np.count_nonzero(scores > own, axis=1)
    ties = np.count_nonzero(scores == own, axis=1)
    ranks = 1 + greater + (uniform * ties).astype(np.int64)
    unreachable = np.isnan(own[:, 0]) | np.isneginf(own[:, 0])
    return np.where(unreachable, 0, ranks)


def self_information(counts: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """`-log2 p(item)` in bits, p from training counts with add-one smoothing.

    >>> self_information(np.array([3, 1, 0, 0]))
    array([1., 2., 3., 3.])
    """
    return -np.log2((counts + 1) / (counts.sum() + len(counts)))


def novelty(
    recommended: NDArray[np.integer[Any]], information: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean self-information of the recommended items, in bits, one value per query.

    Vargas and Castells, "Rank and Relevance in Novelty and Diversity Metrics for Recommender
    Systems", RecSys 2011 (without rank discount). High values alone are no merit.

    Args:
        recommended: `[n, k]` corpus rows, -1 where fewer than k items could be recommended.
        information: `[num_items]` from `self_information`.

    Returns:
        `[n]` bits; 0 where nothing could be recommended.

    >>> novelty(np.array([[0, 2], [1, -1]]), np.array([1.0, 2.0, 3.0]))
    array([2., 2.])
    """
    valid = recommended >= 0
    bits = np.where(valid, information[recommended], 0.0).sum(axis=1)
    return bits / np.maximum(valid.sum(axis=1), 1)


def coverage(recommended: NDArray[np.integer[Any]], num_items: int) -> float:
    """Share of the corpus that is recommended to at least one query.

    >>> coverage(np.array([[0, 2], [2, -1]]), 4)
    0.5
    """
    found = np.unique(recommended[recommended >= 0])
    return len(found) / num_items
