import numpy as np
import pytest

from recsys.dataset import Interactions
from recsys.item_statistics import (
    STATISTICS,
    click_statistics,
    item_statistics,
    standardised,
)

DAY = 86_400_000_000


def taken(label, days=None, weight=None):
    n = len(label)
    return Interactions(
        user=np.arange(n),
        user_id=np.array([b"u"] * n, object),
        label=np.array(label, np.int32),
        history=np.zeros((n, 0), np.int32),
        weight=np.ones(n, np.float32) if weight is None else np.array(weight, np.float32),
        exclusions=None,
        at=None if days is None else np.array(days) * DAY,
    )


def test_popularity_recency_and_age_by_hand():
    known = [taken([0, 0, 1, -1], [0, 1, 2, 9], [1, 1, 3, 1]), taken([2], [10])]
    found = item_statistics(known, 4, timed=True)
    columns = dict(zip(STATISTICS, found.T, strict=True))
    shares = np.array([2, 3, 1, 0])
    np.testing.assert_allclose(columns["popularity"], np.log((shares + 1) * 4 / (6 + 4)), rtol=1e-6)
    # The latest fifth of four labels is the last one.
    assert np.argmax(columns["recent_popularity"]) == 2
    np.testing.assert_allclose(columns["days_since_label"], np.log1p([9, 8, 0, 10]), rtol=1e-6)
    assert columns["never_labelled"].tolist() == [0, 0, 0, 1]


def test_without_time_there_is_popularity_alone():
    found = item_statistics([taken([1, 1, 0])], 3, timed=False)
    assert found.shape == (3, 1)
    assert np.argsort(found[:, 0]).tolist() == [2, 0, 1]


def test_a_longer_window_of_the_same_shares_says_the_same():
    once = item_statistics([taken([0, 1, 1] * 100)], 2, timed=False)
    often = item_statistics([taken([0, 1, 1] * 1000)], 2, timed=False)
    np.testing.assert_allclose(once, often, atol=0.01)


def test_later_statistics_are_read_by_the_scale_of_the_earlier():
    before = np.array([[0.0, 5.0], [2.0, 5.0]], np.float32)
    after = np.array([[3.0, 6.0], [1.0, 5.0]], np.float32)
    assert standardised(before, before).tolist() == [[-1, 0], [1, 0]]
    assert standardised(after, before).tolist() == [[2, 1], [0, 0]]


def test_no_label_at_all_is_no_error():
    assert np.isfinite(item_statistics([taken([-1], [3])], 2, timed=True)).all()
    assert item_statistics([taken([-1], [3])], 2, timed=True)[:, 0] == pytest.approx([0, 0])


def test_click_rates_are_drawn_to_the_mean_and_compared_with_it():
    shown, clicked = np.array([1000, 10, 0, 990]), np.array([900, 9, 0, 100])
    odds, share = click_statistics(shown, clicked).T
    rate = 1010 / 2002
    mean = np.log(rate / (1 - rate))
    first = np.log((900 + 10 * rate) / (100 + 10 * (1 - rate))) - mean
    assert odds[0] == pytest.approx(first, rel=1e-4)
    # The same rate of fewer shows says less, no show says nothing.
    assert odds[0] > odds[1] > odds[2] == pytest.approx(0, abs=1e-6)
    assert odds[3] < 0
    np.testing.assert_allclose(share, np.log((shown + 1) * 4 / 2004), rtol=1e-5)
    assert np.isfinite(click_statistics(np.zeros(2, int), np.zeros(2, int))).all()
