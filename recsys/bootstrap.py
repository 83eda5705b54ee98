"""Confidence intervals of means over queries, by resampling users.

The queries of one user are alike, so users, not queries, are drawn with replacement: a percentile
cluster bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8, 13).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.artifacts import Estimate

_BLOCK_DRAWS = 4_000_000  # users drawn at a time: about 64 MB of integers


def resampled_means(
    values: NDArray[np.floating[Any]], users: NDArray[np.integer[Any]], samples: int, seed: int
) -> NDArray[np.float64]:
    """Means over the queries of resampled users.

    Equal users, samples and seed give equal resamples, so the rows of two calls are pairs.

    Args:
        values: `[n, m]`, a column per metric.
        users: `[n]` codes.
        samples: number of resamples.
        seed: of the draws.

    Returns:
        `[samples, m]`.
    """
    _, codes = np.unique(users, return_inverse=True)
    num_users = int(codes.max()) + 1
    columns = [*values.T, np.ones(len(values))]
    sums = np.stack([np.bincount(codes, column, num_users) for column in columns], axis=1)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_DRAWS // num_users)
    means = []
    for first in range(0, samples, block):
        size = min(block, samples - first)
        draws = rng.integers(num_users, size=(size, num_users))
        draws += np.arange(size)[:, None] * num_users
        times = np.bincount(draws.ravel(), minlength=size * num_users).reshape(size, num_users)
        totals = times.astype(np.float64) @ sums
        means.append(totals[:, :-1] / totals[:, -1:])
    return np.concatenate(means)


def interval(value: float, replicates: NDArray[np.float64], confidence: float) -> Estimate:
    """Percentile interval of a statistic from its `[samples]` bootstrap replicates."""
    low, high = np.quantile(replicates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value=float(value), low=float(low), high=float(high))


def relative_lift(value: Any, reference: Any, num_queries: int) -> Any:
    """`value / reference - 1` of two means over queries, finite also where the reference is 0.

    A reference below one full hit in all queries counts as one hit (`1 / num_queries`): reports
    are JSON, which has no infinity, and the lift is then understated, not overstated.

    >>> float(relative_lift(0.5, 0.25, 100)), float(relative_lift(0.5, 0.0, 100))
    (1.0, 50.0)
    """
    return (value - reference) / np.maximum(reference, 1 / num_queries)


def paired_lift(
    values: NDArray[np.floating[Any]],
    reference: NDArray[np.floating[Any]],
    users: NDArray[np.integer[Any]],
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> Estimate:
    """Relative lift of the mean of `values` over that of `reference`, both `[n]` by query.

    Both means come from the same resamples, so what makes a query easy or hard for both cancels.
    """
    means = resampled_means(np.stack([values, reference], axis=1), users, samples, seed)
    return interval(
        relative_lift(np.mean(values), np.mean(reference), len(values)),
        relative_lift(means[:, 0], means[:, 1], len(values)),
        confidence,
    )
