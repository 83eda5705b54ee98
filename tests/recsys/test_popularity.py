import doctest
from types import SimpleNamespace

import numpy as np

import recsys.popularity
from recsys.popularity import places, popularity_levels


def split(*labels):
    return SimpleNamespace(label=np.array(labels, np.int32))


def test_doctests_hold():
    result = doctest.testmod(recsys.popularity)
    assert result.attempted >= 1
    assert result.failed == 0


def test_levels_count_labels_of_all_splits_and_equal_counts_are_equal():
    found = popularity_levels([split(3, 3, 1, -1), split(3, 2)], 5)
    assert found.tolist() == [0, 1, 1, 2, 0]
    assert found.dtype == np.float32


def test_places_order_each_row_by_value_then_level():
    rng = np.random.default_rng(0)
    rows, values, levels = (rng.integers(0, 6, 200) for _ in range(3))
    found = places(rows, values, levels)
    for row in range(6):
        own = rows == row
        pairs = list(zip(values[own].tolist(), levels[own].tolist(), strict=True))
        distinct = sorted(set(pairs))
        assert found[own].tolist() == [distinct.index(pair) for pair in pairs]


def test_no_entry_has_no_place():
    empty = np.zeros(0, np.int64)
    assert places(empty, empty, empty).tolist() == []
