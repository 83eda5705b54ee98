"""Scores to log odds that can be believed: a temperature and an offset, fitted on held-out data.

Platt, "Probabilistic Outputs for Support Vector Machines", 1999; with the offset alone left out it
is the temperature of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. Scores of a
pairwise or listwise loss have no level of their own, so an offset is needed. Neither changes an
order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit

from recsys.binary_metrics import Labels

#: Orders stay as they are, and scores apart, whatever little data say.
_LEAST_SCALE, _MOST_SCALE = 1e-2, 1e2


class Calibration(NamedTuple):
    """`scale * score + offset` are log odds; the temperature is `1 / scale`, which is positive."""

    scale: float
    offset: float

    def __call__(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Calibrate scores of any shape."""
        return self.scale * scores.astype(np.float64) + self.offset


def fit_calibration(labels: Labels, scores: NDArray[np.floating[Any]]) -> Calibration:
    """Minimise the log loss of the labels.

    Args:
        labels: `[n]`, 0 or 1.
        scores: `[n]`, finite.

    Returns:
        The calibration; the scores as they are where labels are all equal.
    """
    taken = np.asarray(labels, np.float64)
    scores = scores.astype(np.float64)
    if not 0 < taken.mean() < 1:
        return Calibration(1.0, 0.0)

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        odds = np.exp(parameters[0]) * scores + parameters[1]
        value = np.mean(np.logaddexp(0, odds) - taken * odds)
        residual = (expit(odds) - taken) / len(taken)
        slope = np.exp(parameters[0]) * (residual @ scores)
        return value, np.array([slope, residual.sum()])

    bounds = [(np.log(_LEAST_SCALE), np.log(_MOST_SCALE)), (None, None)]
    start = np.array([0.0, logit(taken.mean()) - scores.mean()])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return Calibration(float(np.exp(found[0])), float(found[1]))
