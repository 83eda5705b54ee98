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
    splits: NDArray[np.integer[Any]] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Recall, hit rate, NDCG and MRR at each k, one value in [0, 1] per query.

    Recall divides by all relevant items of the query, also where they are more than k (Manning,
    Raghavan and Schütze, "Introduction to Information Retrieval", 2008, chapter 8; so do the
    published tables of given train and test files since NGCF, SIGIR 2019, and LightGCN, SIGIR
    2020). Liang et al. (WWW 2018) divide by `min(k, relevant)`: not comparable. The ideal DCG of
    NDCG has `min(k, relevant)` items (Järvelin and Kekäläinen, "Cumulated Gain-Based Evaluation of
    IR Techniques", 2002). MRR is the reciprocal rank of the first hit. With one relevant item per
    query recall equals hit rate.

    Args:
        ranks: `[num_labels]` of the relevant items, those of one query side by side.
        ks: depths of the list.
        splits: `[n + 1]` where the ranks of each query begin and end; one each if not given.

    Returns:
        `[n]` values by name, such as `ndcg@10`.

    Raises:
        ValueError: a query has no relevant item, so that its recall is undefined.

    >>> {name: values.tolist() for name, values in per_query(np.array([1, 2, 3, 0]), [2]).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'recall@2': [1.0, 1.0, 0.0, 0.0], 'hit_rate@2': [1.0, 1.0, 0.0, 0.0],
     'ndcg@2': [1.0, 0.6309297535714575, 0.0, 0.0], 'mrr@2': [1.0, 0.5, 0.0, 0.0]}
    >>> per_query(np.array([1, 4, 2]), [3], np.array([0, 2, 3]))["recall@3"]
    array([0.5, 1. ])
    """
    splits = np.arange(len(ranks) + 1) if splits is None else splits
    relevant, begins = np.diff(splits), splits[:-1]
    if np.any(relevant < 1):
        raise ValueError("every query needs at least one relevant item; drop those without")
    filled = np.maximum(ranks, 1)
    ideal = np.cumsum(1 / np.log2(np.arange(max(ks)) + 2))
    metrics = {}
    for k in ks:
        hit = ((ranks > 0) & (ranks <= k)).astype(np.float64)
        gain = np.add.reduceat(hit / np.log2(filled + 1), begins)
        metrics[f"recall@{k}"] = np.add.reduceat(hit, begins) / relevant
        metrics[f"hit_rate@{k}"] = np.maximum.reduceat(hit, begins)
        # Gains that are added up in another order than the ideal ones may exceed them by rounding.
        metrics[f"ndcg@{k}"] = np.minimum(gain / ideal[np.minimum(relevant, k) - 1], 1)
        metrics[f"mrr@{k}"] = np.maximum.reduceat(hit / filled, begins)
    return metrics


def rank_of_label(
    scores: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    uniform: NDArray[np.float64],
    splits: NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.int64]:
    """Rank of each label by its id, ties broken uniformly at random.

    A scorer that gives every item the same score so ranks labels at chance level instead of first
    (or by corpus order, which is popularity). Labels of one query that tie with each other get
    different ranks, drawn without replacement, as a shuffle of all tied items would place them.

    Args:
        scores: `[n, num_items]`; -inf where a candidate is excluded.
        labels: `[num_labels]` corpus rows, -1 for an item that is not in the corpus; those of one
            query are different items, side by side.
        uniform: `[num_labels]` random numbers in [0, 1), that place each label among its ties.
        splits: `[n + 1]` where the labels of each query begin and end; one each if not given.

    Returns:
        `[num_labels]` ranks from 1; 0 where the label is excluded, not in the corpus, or scored
        NaN.

    >>> scores = np.array([[0.3, 0.2, 0.1], [0.5, 0.5, 0.5], [-np.inf, 0.0, 0.0]])
    >>> rank_of_label(scores, np.array([1, 0, 0]), np.array([0.9, 0.9, 0.9]))
    array([2, 3, 0])
    >>> rank_of_label(scores[1:2], np.array([0, 2]), np.array([0.9, 0.9]), np.array([0, 2]))
    array([3, 2])
    """
    splits = np.arange(len(labels) + 1) if splits is None else splits
    query = np.repeat(np.arange(len(scores)), np.diff(splits))
    own = np.where(labels >= 0, scores[query, np.maximum(labels, 0)], np.nan).astype(scores.dtype)
    greater, ties = np.zeros(len(labels), np.int64), np.zeros(len(labels), np.int64)
    nth = np.arange(len(labels)) - splits[query]
    for turn in range(int(nth.max(initial=-1)) + 1):
        # One label of each query at a time: never more than the scores themselves is copied.
        now = np.flatnonzero(nth == turn)
        rows = scores if len(now) == len(scores) else scores[query[now]]
        greater[now] = np.count_nonzero(rows > own[now, None], axis=1)
        ties[now] = np.count_nonzero(rows == own[now, None], axis=1)
    ranks = np.zeros(len(labels), np.int64)
    reachable = ~(np.isnan(own) | np.isneginf(own))
    tied = (query[reachable], greater[reachable], ties[reachable])
    ranks[reachable] = 1 + greater[reachable] + _places(*tied, uniform[reachable])
    return ranks


def _places(
    query: NDArray[np.int64],
    greater: NDArray[np.int64],
    ties: NDArray[np.int64],
    uniform: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Place of each label among its ties, from 0, no two labels of a query in the same one.

    Labels tie where as many items of their query are above them. Each takes one of the places
    that those before it have left free.
    """
    order = np.lexsort((greater, query))
    new = (np.diff(query[order], prepend=-1) != 0) | (np.diff(greater[order], prepend=-1) != 0)
    nth = np.arange(len(order)) - np.flatnonzero(new)[np.cumsum(new) - 1]
    place = (uniform[order] * (ties[order] - nth)).astype(np.int64)
    for turn in range(1, int(nth.max(initial=0)) + 1):
        now = np.flatnonzero(nth == turn)
        taken = np.sort(place[now[:, None] - np.arange(1, turn + 1)], axis=1)
        for earlier in taken.T:
            place[now] += place[now] >= earlier
    found = np.empty_like(place)
    found[order] = place
    return found


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
