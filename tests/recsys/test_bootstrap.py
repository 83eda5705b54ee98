import doctest
import json

import numpy as np
import pytest

import recsys.bootstrap
from recsys.bootstrap import interval, paired_lift, resampled_means

SETTINGS = {"samples": 400, "confidence": 0.95, "seed": 1}


def bootstrap(values, users, *, samples, confidence, seed):
    replicates = resampled_means(values[:, None], users, samples, seed)[:, 0]
    return interval(values.mean(), replicates, confidence)


def test_doctests_hold():
    result = doctest.testmod(recsys.bootstrap)
    assert result.attempted >= 1
    assert result.failed == 0


def test_one_query_per_user_gives_the_normal_interval():
    values = np.random.default_rng(0).random(2_000)
    found = bootstrap(values, np.arange(2_000), **SETTINGS)
    half = 1.96 * values.std() / np.sqrt(2_000)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=half / 4)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 4)


def test_queries_of_a_user_are_drawn_together():
    # 50 users of 40 equal queries each hold the information of 50 queries, not of 2,000.
    per_user = np.random.default_rng(0).random(50)
    values = np.repeat(per_user, 40)
    clustered = bootstrap(values, np.repeat(np.arange(50), 40), **SETTINGS)
    half = 1.96 * per_user.std() / np.sqrt(50)
    assert clustered.high - clustered.low == pytest.approx(2 * half, rel=0.2)
    naive = bootstrap(values, np.arange(2_000), **SETTINGS)
    assert naive.high - naive.low < (clustered.high - clustered.low) / 4


def test_users_with_more_queries_weigh_more():
    means = resampled_means(np.array([[1.0], [1.0], [1.0], [0.0]]), np.array([5, 5, 5, 9]), 500, 0)
    # Draws of two users: both the first, both the second, or one of each.
    assert set(np.unique(means)) == {0.0, 0.75, 1.0}


def test_resamples_do_not_depend_on_the_block_size(monkeypatch):
    values = np.random.default_rng(0).random((300, 2))
    users = np.arange(300) % 70
    whole = resampled_means(values, users, 40, 3)
    monkeypatch.setattr(recsys.bootstrap, "_BLOCK_DRAWS", 70 * 7)
    np.testing.assert_allclose(resampled_means(values, users, 40, 3), whole, rtol=1e-12)


def test_the_seed_decides():
    values, users = np.random.default_rng(0).random(100), np.arange(100)
    same = [bootstrap(values, users, **SETTINGS) for _ in range(2)]
    assert same[0] == same[1]
    assert bootstrap(values, users, **(SETTINGS | {"seed": 2})) != same[0]


def test_pairing_sees_a_small_lift_that_independent_intervals_hide():
    rng = np.random.default_rng(0)
    reference = rng.random(1_000)
    values = 1.02 * reference
    users = np.arange(1_000)
    lift = paired_lift(values, reference, users, **SETTINGS)
    assert lift.value == pytest.approx(0.02)
    assert lift.low == pytest.approx(0.02)
    one, other = (bootstrap(v, users, **SETTINGS) for v in (values, reference))
    assert one.low < other.high


def test_no_difference_is_a_lift_of_0():
    values = np.random.default_rng(0).random(100)
    lift = paired_lift(values, values, np.arange(100), **SETTINGS)
    assert (lift.value, lift.low, lift.high) == (0, 0, 0)


def test_lift_over_a_reference_of_0_is_finite_json():
    hits = np.zeros(100)
    hits[:30] = 1
    lift = paired_lift(hits, np.zeros(100), np.arange(100), **SETTINGS)
    assert lift.value == pytest.approx(30)
    assert lift.low > 0
    assert None not in json.loads(lift.model_dump_json()).values()
    assert paired_lift(np.zeros(9), np.zeros(9), np.arange(9), **SETTINGS).value == 0
