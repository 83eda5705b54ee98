import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from sklearn.metrics import ndcg_score

import recsys.metrics
from recsys.metrics import coverage, novelty, per_query, rank_of_label, self_information

RANKS = npst.arrays(np.int64, st.integers(1, 30), elements=st.integers(0, 50))


def test_doctests_hold():
    result = doctest.testmod(recsys.metrics)
    assert result.attempted >= 6
    assert result.failed == 0


@pytest.mark.parametrize(
    ("rank", "recall", "ndcg", "mrr"),
    [(1, 1, 1, 1), (2, 1, 1 / np.log2(3), 1 / 2), (10, 1, 1 / np.log2(11), 1 / 10),
     (11, 0, 0, 0), (0, 0, 0, 0)],
)  # fmt: skip
def test_single_label_by_hand(rank, recall, ndcg, mrr):
    found = {name: value[0] for name, value in per_query(np.array([rank]), [10]).items()}
    assert found == pytest.approx(
        {"recall@10": recall, "hit_rate@10": recall, "ndcg@10": ndcg, "mrr@10": mrr}
    )


def test_several_relevant_items_by_hand():
    # Three relevant items at ranks 2, 5 and beyond retrieval; a list of 3 finds the first.
    found = per_query(np.array([[5, 2, 0]]), [3, 5])
    ideal = 1 + 1 / np.log2(3) + 1 / 2
    assert found["recall@3"] == pytest.approx(1 / 3)
    assert found["recall@5"] == pytest.approx(2 / 3)
    assert found["hit_rate@3"] == 1
    assert found["mrr@5"] == pytest.approx(1 / 2)
    assert found["ndcg@5"] == pytest.approx((1 / np.log2(3) + 1 / np.log2(6)) / ideal)


def test_padded_ranks_use_the_number_of_relevant_items():
    found = per_query(np.array([[1, 0, 0], [1, 2, 3]]), [2], num_relevant=np.array([1, 3]))
    np.testing.assert_allclose(found["recall@2"], [1, 2 / 3])
    np.testing.assert_allclose(found["ndcg@2"], [1, 1])


def test_a_query_without_relevant_items_is_refused():
    with pytest.raises(ValueError, match="at least one relevant item"):
        per_query(np.array([[1], [0]]), [2], num_relevant=np.array([1, 0]))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_ndcg_agrees_with_scikit_learn(k):
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(20.0), (50, 1)), axis=1)
    relevant = rng.random((50, 20)) < 0.2
    relevant[:, 0] = True
    position = 1 + np.argsort(np.argsort(-scores, axis=1), axis=1)
    ranks = np.where(relevant, position, 0)
    ours = per_query(ranks, [k], num_relevant=relevant.sum(axis=1))[f"ndcg@{k}"]
    theirs = [ndcg_score(relevant[[i]], scores[[i]], k=k) for i in range(50)]
    np.testing.assert_allclose(ours, theirs)


@settings(max_examples=50, deadline=None)
@given(RANKS)
def test_metrics_are_bounded_and_grow_with_k(ranks):
    found = per_query(ranks, range(1, 21))
    assert len(found) == 80
    for name, value in found.items():
        assert np.all((value >= 0) & (value <= 1)), name
    for metric in ("recall", "hit_rate", "ndcg", "mrr"):
        table = np.stack([found[f"{metric}@{k}"] for k in range(1, 21)])
        assert np.all(np.diff(table, axis=0) >= 0), metric


@settings(max_examples=50, deadline=None)
@given(RANKS)
def test_of_one_item_mrr_at_most_ndcg_at_most_recall(ranks):
    found = per_query(ranks, [10])
    assert np.all(found["mrr@10"] <= found["ndcg@10"] + 1e-12)
    assert np.all(found["ndcg@10"] <= found["recall@10"])
    np.testing.assert_array_equal(found["recall@10"], found["hit_rate@10"])


def test_rank_counts_strictly_better_items():
    scores = np.array([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5]], np.float32)
    found = rank_of_label(scores, np.array([2, 1]), np.array([0.0, 0.99]))
    np.testing.assert_array_equal(found, [2, 1])


def test_a_constant_scorer_ranks_at_chance_level():
    num_queries, num_items, k = 20_000, 50, 10
    scores = np.zeros((num_queries, num_items), np.float32)
    uniform = np.random.default_rng(0).random(num_queries)
    ranks = rank_of_label(scores, np.zeros(num_queries, np.int64), uniform)
    assert set(ranks) == set(range(1, num_items + 1))
    # Five standard errors of a share of 0.2.
    assert per_query(ranks, [k])["recall@10"].mean() == pytest.approx(k / num_items, abs=0.015)


def test_ties_stay_within_their_block():
    scores = np.array([[3.0, 1.0, 1.0, 1.0, 0.0]])
    lowest, highest = (
        rank_of_label(scores, np.array([2]), np.array([u]))[0] for u in (0.0, np.nextafter(1, 0))
    )
    assert (lowest, highest) == (2, 4)


@pytest.mark.parametrize("label", [-1, 0, 1])
def test_labels_that_cannot_be_retrieved_have_rank_0(label):
    scores = np.array([[-np.inf, np.nan, 1.0]])  # excluded, broken, fine
    assert rank_of_label(scores, np.array([label]), np.array([0.5]))[0] == 0


def test_excluded_candidates_do_not_push_the_label_down():
    scores = np.array([[9.0, 1.0, 8.0]])
    uniform = np.array([0.5])
    assert rank_of_label(scores, np.array([1]), uniform)[0] == 3
    scores[0, 0] = -np.inf
    assert rank_of_label(scores, np.array([1]), uniform)[0] == 2


def test_novelty_is_higher_for_rare_items_and_finite_for_unseen_ones():
    information = self_information(np.array([100, 10, 0]))
    assert information[0] < information[1] < information[2] < np.inf
    found = novelty(np.array([[0], [1], [2], [-1]]), information)
    np.testing.assert_allclose(found, [*information, 0])
    assert np.sum(2**-information) == pytest.approx(1)


def test_coverage_counts_an_item_once_and_no_padding():
    assert coverage(np.array([[1, 1], [1, -1]]), 4) == 0.25
    assert coverage(np.full((3, 2), -1), 4) == 0
