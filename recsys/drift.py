"""How far apart two histograms over the same bins are: PSI and the Jensen-Shannon distance.

PSI is the symmetrised Kullback-Leibler divergence; 0.1 is commonly called a small change and 0.25 a
large one. Without any drift it is about `(bins - 1) * (1 / n + 1 / m)` for `n` and `m` independent
values (Yurdakul, Statistical Properties of Population Stability Index, 2018): a bin needs values.

Half a value is added to each bin of either side, so that an empty bin gives a finite PSI; bins that
are empty on both sides are left out. Both measures are of these smoothed shares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import rel_entr

_ADDED = 0.5


def psi(reference: ArrayLike, today: ArrayLike) -> float:
    """Population stability index of two lists of counts, `[bins]`; 0 where nothing was counted."""
    return float(psi_terms(reference, today).sum())


def psi_terms(reference: ArrayLike, today: ArrayLike) -> NDArray[np.float64]:
    """What each bin, `[bins]`, adds to the PSI: none is negative."""
    p, q = _shares(reference, today)
    used = p > 0
    terms = np.zeros(len(p))
    terms[used] = (q[used] - p[used]) * np.log(q[used] / p[used])
    return terms


def jensen_shannon(reference: ArrayLike, today: ArrayLike) -> float:
    """Jensen-Shannon distance of two lists of counts, `[bins]`: 0 for equal ones, at most 1.

    It is the square root of the divergence in bits, as `scipy.spatial.distance.jensenshannon` with
    base 2, which is NaN for some pairs that differ by a rounding error only.
    """
    p, q = _shares(reference, today)
    middle = (p + q) / 2
    divergence = (rel_entr(p, middle).sum() + rel_entr(q, middle).sum()) / 2
    return float(np.sqrt(max(divergence, 0.0) / np.log(2)))


def _shares(reference: ArrayLike, today: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    counts = np.stack([np.asarray(reference, np.float64), np.asarray(today, np.float64)])
    smoothed = np.where(counts.sum(axis=0) > 0, counts + _ADDED, 0.0)
    totals = smoothed.sum(axis=1, keepdims=True)
    p, q = smoothed / np.where(totals > 0, totals, 1.0)
    return p, q
