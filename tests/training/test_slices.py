import doctest

import numpy as np
import pytest

import training.slices
from recsys.dataset import Corpus, Interactions
from recsys.metrics import per_query
from training.slices import popularity_thirds, slices


def interactions(users, labels, lengths, splits=None):
    history = np.where(np.arange(12) < np.array(lengths)[:, None], 0, -1).astype(np.int32)
    return Interactions(
        user=np.arange(len(users)),
        user_id=np.array(users, np.object_),
        label=np.array(labels, np.int32),
        history=history,
        weight=np.ones(len(users), np.float32),
        exclusions=None,
        splits=splits,
    )


def corpus(count, labels):
    ids = np.array([b"i"] * len(count), np.object_)
    return Corpus(ids, ids, np.array(count), np.array(labels), {})


def test_doctests_hold():
    result = doctest.testmod(training.slices)
    assert result.attempted == 1
    assert result.failed == 0


@pytest.mark.parametrize("labels", [[0, 0, 0], [7], [3, 3, 3], [1, 0, 900, 50, 50]])
def test_every_item_has_a_tier_and_more_labels_no_lower_one(labels):
    tiers = popularity_thirds(np.array(labels))
    assert set(tiers) <= {0, 1, 2}
    order = np.argsort(-np.array(labels), kind="stable")
    assert np.all(np.diff(tiers[order]) >= 0)


def test_buckets_by_hand():
    train = interactions([b"a", b"b"], [0, 1], [1, 1])
    # Items: head, torso, tail, tail without a label, cold; -1 is not in the corpus.
    queries = interactions(
        [b"a", b"a", b"new", b"b", b"b", b"b"], [0, 1, 2, 3, 4, -1], [0, 1, 2, 4, 9, 12]
    )
    value = np.array([1.0, 0, 0, 1, 1, 0])
    ranks = np.array([1, 2, 0, 1, 1, 0])
    items = corpus([9, 5, 3, 1, 0], [4, 4, 4, 0, 0])
    found = slices({"recall@1": value}, queries, ranks, train, items)
    assert found["user"] == {
        "warm": {"queries": 5, "recall@1": pytest.approx(3 / 5)},
        "cold": {"queries": 1, "recall@1": 0},
    }
    assert {name: b["queries"] for name, b in found["history_length"].items()} == {
        "0": 1, "1": 1, "2-4": 2, "5-9": 1, "10+": 1,
    }  # fmt: skip
    assert found["item_popularity"] == {
        "head": {"queries": 1, "recall@1": 1},
        "torso": {"queries": 1, "recall@1": 0},
        "tail": {"queries": 2, "recall@1": 0.5},
        "cold": {"queries": 2, "recall@1": 0.5},
    }


def test_each_slice_parts_the_queries_and_empty_buckets_are_left_out():
    queries = interactions([b"a"] * 3, [0, 0, 0], [3, 4, 6])
    value = {"novelty@1": np.array([1.0, 2, 6])}
    found = slices(value, queries, np.array([1, 1, 1]), queries, corpus([1], [3]))
    assert found == {
        "user": {"warm": {"queries": 3, "novelty@1": 3}},
        "history_length": {
            "2-4": {"queries": 2, "novelty@1": 1.5},
            "5-9": {"queries": 1, "novelty@1": 6},
        },
        "item_popularity": {"head": {"queries": 3, "novelty@1": 3}},
    }


def test_a_query_with_several_labels_is_in_the_tier_of_each():
    # Items: head, torso, tail, cold. Ranks: 1, 9 and 2 of the first query, 0 and 3 of the second.
    queries = interactions([b"a", b"b"], [0, 2, 3, -1, 0], [1, 1], np.array([0, 3, 5]))
    ranks = np.array([1, 9, 2, 0, 3])
    values = per_query(ranks, [2], queries.splits) | {"novelty@2": np.array([5.0, 7.0])}
    train = interactions([b"a"], [0], [1])
    found = slices(values, queries, ranks, train, corpus([9, 5, 3, 0], [4, 4, 4, 0]))
    assert found["user"]["warm"]["recall@2"] == pytest.approx(2 / 3)
    tiers = found["item_popularity"]
    assert {name: b["queries"] for name, b in tiers.items()} == {"head": 2, "tail": 1, "cold": 2}
    assert tiers["head"]["recall@2"] == 0.5
    assert tiers["tail"]["recall@2"] == 0
    assert tiers["cold"]["hit_rate@2"] == 0.5
    # The only relevant item there, at rank 2 of the whole list.
    assert tiers["cold"]["ndcg@2"] == pytest.approx(0.5 / np.log2(3))
    assert tiers["cold"]["novelty@2"] == 6
