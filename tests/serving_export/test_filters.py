import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError
from recsys.dataset import Corpus
from recsys.schema import Feature
from serving_export.filters import Between, OneOf, contains, item_filters

VALUES = np.array([b"red", b"blue", b"", "grün".encode(), b"red"], object)
PRICES = np.array([3.0, 1.0, np.nan, 2.0, -5.0], np.float32)
EVERYTHING = tf.range(5)[tf.newaxis]


@pytest.mark.parametrize(
    ("asked", "passing"),
    [
        (["", ""], [0, 1, 2, 3, 4]),
        (["red", ""], [0, 4]),
        (["", "grün"], [3]),
        (["red", "blue"], [0, 1, 4]),
        (["red", "red"], [0, 4]),
        (["🤷", ""], []),
        (["🤷", "blue"], [1]),
    ],
)
def test_one_of(asked, passing):
    made = OneOf(VALUES)
    found = made.passes(tf.constant([asked]), EVERYTHING).numpy()
    assert np.flatnonzero(found[0]).tolist() == passing
    share = made.share(tf.constant([asked])).numpy()[0]
    assert share >= len(passing) / 5 - 1e-6
    if len(set(asked)) == 2:
        assert share == pytest.approx(len(passing) / 5)
    backwards = made.passes(tf.constant([asked, ["", ""]]), tf.constant([[4, 0, 2], [2, 2, 2]]))
    assert backwards.numpy().tolist() == [[row in passing for row in (4, 0, 2)], [True] * 3]


def test_one_of_no_column_at_all_is_open():
    nothing = tf.zeros([2, 0], tf.string)
    assert OneOf(VALUES).passes(nothing, EVERYTHING).numpy().all()
    assert OneOf(VALUES).share(nothing).numpy().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("asked", "passing"),
    [
        ([np.nan, np.nan], [0, 1, 2, 3, 4]),
        ([-np.inf, np.inf], [0, 1, 2, 3, 4]),
        ([1, 2], [1, 3]),
        ([1, np.nan], [0, 1, 3]),
        ([np.inf, 1], [1, 4]),
        ([np.nan, 0], [4]),
        ([2, 1], []),
        ([9, 10], []),
    ],
)
def test_between(asked, passing):
    made, asked = Between(PRICES), tf.constant([asked], tf.float32)
    found = made.passes(asked, EVERYTHING).numpy()
    assert np.flatnonzero(found[0]).tolist() == passing
    assert made.share(asked).numpy()[0] == pytest.approx(len(passing) / 5)


def test_a_contract_tells_what_there_is_to_ask_for():
    assert OneOf(VALUES).describe() == {
        "kind": "one_of", "num_values": 3, "frequent": ["red", "blue", "grün"],
    }  # fmt: skip
    assert Between(PRICES).describe() == {"kind": "between", "ends": [-5.0, 3.0]}


def test_a_feature_without_values_is_refused():
    ids, counts = np.array([b"i", b"j"], object), np.zeros(2, np.int64)
    features = {"price": np.full(2, np.nan, np.float32), "kind": np.array([b"", b"x"], object)}
    corpus = Corpus(ids, ids, counts, counts, features)
    price = Feature(name="price", side="candidate", kind="number", column="cost")
    kind = Feature(name="kind", side="candidate", kind="category")
    assert set(item_filters(corpus, [kind])) == {"kind"}
    with pytest.raises(ArtifactError, match=r"none of 2 items has a value of 'price' .*'cost'"):
        item_filters(corpus, [kind, price])


def test_contains_is_membership_by_row():
    random = np.random.default_rng(1)
    listed, wanted = random.integers(-1, 9, (20, 4)), random.integers(-1, 9, (20, 6))
    expected = [
        [number >= 0 and number in row for number in sought]
        for row, sought in zip(listed.tolist(), wanted.tolist(), strict=True)
    ]
    found = contains(tf.constant(listed, tf.int32), tf.constant(wanted, tf.int32), 9)
    assert found.numpy().tolist() == expected
    nothing = contains(tf.zeros([20, 0], tf.int32), tf.constant(wanted, tf.int32), 9)
    assert not nothing.numpy().any()
