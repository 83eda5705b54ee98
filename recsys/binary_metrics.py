"""How well scores tell what was taken from what was only listed, and how far they can be believed.

Scores are log odds; labels are 0 or 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import rankdata

Labels = NDArray[np.integer[Any]] | NDArray[np.bool_]


def auc(labels: Labels, scores: NDArray[np.floating[Any]]) -> float:
    """Probability that a random positive has a higher score than a random negative; a tie is half.

    Hanley and McNeil, "The Meaning and Use of the Area under a ROC Curve", 1982.

    Args:
        labels: `[n]`.
        scores: `[n]`.

    Returns:
        In [0, 1]; NaN where labels are all equal.

    >>> auc(np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.5, 0.5]))
    0.875
    """
    positives = np.count_nonzero(labels)
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores)[np.asarray(labels, bool)].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


def grouped_auc(
    labels: Labels, scores: NDArray[np.floating[Any]], groups: NDArray[np.integer[Any]]
) -> float:
    """Mean AUC within groups, such as users, weighed by how many rows they have.

    Groups that have no positive or no negative say nothing and do not count (Zhu et al., "Optimized
    Cost per Click in Taobao Display Advertising", KDD 2017; Zhou et al., KDD 2018).

    Args:
        labels: `[n]`.
        scores: `[n]`.
        groups: `[n]` codes.

    Returns:
        In [0, 1]; NaN where no group counts.

    >>> grouped_auc(np.array([1, 0, 0, 1]), np.array([2.0, 1.0, 9.0, 3.0]), np.array([0, 0, 1, 1]))
    0.5
    """
    order = np.argsort(groups, kind="stable")
    begins = np.flatnonzero(np.diff(groups[order], prepend=groups[order][:1] - 1))
    parts = np.split(order, begins[1:])
    values = np.array([auc(labels[part], scores[part]) for part in parts])
    counts = ~np.isnan(values)
    if not counts.any():
        return float("nan")
    sizes = np.array([len(part) for part in parts], np.float64)
    return float(np.average(values[counts], weights=sizes[counts]))


def log_loss(labels: Labels, scores: NDArray[np.floating[Any]]) -> float:
    """Mean negative log likelihood of the labels, in nats.

    >>> round(log_loss(np.array([1, 0]), np.array([0.0, 0.0])), 4)
    0.6931
    """
    signs = np.where(np.asarray(labels, bool), -1.0, 1.0)
    return float(np.logaddexp(0.0, signs * scores).mean())


def expected_calibration_error(
    labels: Labels, scores: NDArray[np.floating[Any]], bins: int = 15
) -> float:
    """Mean distance of predicted probability and share of positives, over bins of equal size.

    Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015, with
    equally filled bins: where few are positive, equally wide ones would hold nearly all in one.

    Args:
        labels: `[n]`.
        scores: `[n]` log odds.
        bins: at most.

    >>> expected_calibration_error(np.array([1, 0, 1, 0]), np.zeros(4))
    0.0
    """
    order = np.argsort(scores, kind="stable")
    edges = np.unique(np.linspace(0, len(order), bins + 1).astype(int))[:-1]
    gaps = expit(scores.astype(np.float64)[order]) - np.asarray(labels, np.float64)[order]
    return float(np.abs(np.add.reduceat(gaps, edges)).sum() / len(order))
