import math

import numpy as np
import pytest
from scipy.spatial import distance

from recsys.drift import jensen_shannon, psi, psi_terms


def test_psi_by_hand():
    """Half a value more in each bin makes 62 values on either side."""
    p, q = [30.5 / 62, 20.5 / 62, 11 / 62], [10.5 / 62, 20.5 / 62, 31 / 62]
    terms = [(b - a) * math.log(b / a) for a, b in zip(p, q, strict=True)]
    reference, today = [30, 20, 10.5], [10, 20, 30.5]
    np.testing.assert_allclose(psi_terms(reference, today), terms)
    assert psi(reference, today) == pytest.approx(0.678, abs=1e-3)
    assert psi(today, reference) == pytest.approx(psi(reference, today))


def test_an_empty_bin_is_finite_and_one_that_both_lack_is_none():
    assert psi([100, 0], [0, 100]) == pytest.approx(2 * (100 / 101) * math.log(201), rel=1e-6)
    assert psi([10, 0, 5], [3, 0, 9]) == psi([10, 5], [3, 9])
    assert jensen_shannon([10, 0, 5], [3, 0, 9]) == jensen_shannon([10, 5], [3, 9])
    assert psi([], []) == jensen_shannon([0, 0], [0, 0]) == 0.0


def test_jensen_shannon_is_that_of_scipy():
    random = np.random.default_rng(0)
    for bins in (2, 10, 500):
        reference, today = random.integers(0, 50, (2, bins)) + np.array([[1], [0]])
        expected = distance.jensenshannon(reference + 0.5, today + 0.5, base=2)
        assert jensen_shannon(reference, today) == pytest.approx(expected)
    assert jensen_shannon([10**9, 0], [0, 10**9]) == pytest.approx(1.0, abs=1e-3)


def test_equal_shares_have_no_distance_whatever_the_totals():
    counts = np.array([300, 500, 200])
    assert psi(counts, counts) == jensen_shannon(counts, counts) == 0.0
    assert psi(counts * 1000, counts * 7000) < 1e-6
    assert jensen_shannon(counts * 1000, counts * 7000) < 1e-3


def test_without_drift_psi_is_as_small_as_its_sampling_says():
    random = np.random.default_rng(1)
    share = np.full(20, 0.05)
    drawn = [
        psi(random.multinomial(1000, share), random.multinomial(500, share)) for _ in range(300)
    ]
    assert np.mean(drawn) == pytest.approx(19 * (1 / 1000 + 1 / 500), rel=0.1)
