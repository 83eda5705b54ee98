import numpy as np
import pytest
import tensorflow as tf

from recsys.config import Export
from recsys.dataset import read_corpus
from serving_export.filters import Between, OneOf
from serving_export.restrictions import Restrictions, restrictions
from serving_export.unavailable import Unavailable, listing

ITEMS = np.array([f"i{n}".encode() for n in range(10)], object)
GROUPS = np.array([b"a"] * 5 + [b"b"] * 4 + [b"c"], object)


@pytest.fixture
def both(tmp_path):
    (tmp_path / "list").write_text(listing(["i0", "i9", "strange"]))
    filters = {"group": OneOf(GROUPS), "price": Between(np.arange(10, dtype=np.float32))}
    return Restrictions(filters, Unavailable(tmp_path / "list", ITEMS), overfetch=4)


def asked(groups, prices):
    return {
        "filter_group": tf.constant([[g] for g in groups], tf.string, [len(groups), 1]),
        "filter_price": tf.constant(prices, tf.float32, [len(prices), 2]),
    }


def test_all_must_allow(both):
    request = asked(["", "a", "b"], [[np.nan, np.nan], [1, 3], [np.nan, 6]])
    found = both.allow(request, tf.range(10)[tf.newaxis]).numpy()
    assert [np.flatnonzero(row).tolist() for row in found] == [[*range(1, 9)], [1, 2, 3], [5, 6]]
    few = both.allow(request, tf.constant([[0, 1], [4, 3], [9, 5]])).numpy()
    assert few.tolist() == [[False, True], [False, True], [False, True]]


@pytest.mark.parametrize(
    ("groups", "fetched"),
    [([""], [22]), (["a"], [40]), (["", "a"], [22, 40]), (["b", "nothing"], [40, 40]), ([], [])],
)
def test_more_is_fetched_where_less_passes(both, groups, fetched):
    """Seven of ten are known to be available: 10 / .7 and half as many more; four times at most."""
    request = asked(groups, [[np.nan, np.nan]] * len(groups))
    assert both.fetched(request, tf.constant(10)).numpy().tolist() == fetched


def test_without_anything_to_restrict_no_more_is_fetched(tmp_path):
    (tmp_path / "list").write_text(listing([]))
    alone = Restrictions({}, Unavailable(tmp_path / "list", ITEMS), overfetch=4)
    assert alone.fetched({}, tf.constant(10)).numpy() == 10
    assert alone.allow({}, tf.constant([[3, 9]])).numpy().tolist() == [[True, True]]


def test_a_config_says_what_is_made(tiny, tmp_path):
    data = tiny.write_data(tmp_path / "data")
    corpus = read_corpus(data)
    assert restrictions(Export(), corpus, data.features, tmp_path) is None
    settings = Export(filters=("item_id", "price"), availability=True)
    made = restrictions(settings, corpus, data.features, tmp_path)
    inputs = {name: (spec.dtype, spec.shape.as_list()) for name, spec in made.inputs().items()}
    assert inputs == {
        "filter_item_id": (tf.string, [None, None]), "filter_price": (tf.float32, [None, 2]),
    }  # fmt: skip
    told = made.describe()
    assert told["availability"] is True
    assert told["filters"]["price"]["input"] == "filter_price"
    assert told["filters"]["item_id"]["num_values"] == tiny.num_items
