import doctest
from math import comb

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
    found = per_query(np.array([5, 2, 0]), [3, 5], np.array([0, 3]))
    ideal = 1 + 1 / np.log2(3) + 1 / 2
    assert found["recall@3"] == pytest.approx(1 / 3)
    assert found["recall@5"] == pytest.approx(2 / 3)
    assert found["hit_rate@3"] == 1
    assert found["mrr@5"] == pytest.approx(1 / 2)
    assert found["ndcg@5"] == pytest.approx((1 / np.log2(3) + 1 / np.log2(6)) / ideal)


def test_queries_with_different_numbers_of_relevant_items():
    found = per_query(np.array([1, 1, 2, 3, 0, 7]), [2], np.array([0, 1, 4, 6]))
    np.testing.assert_allclose(found["recall@2"], [1, 2 / 3, 0])
    np.testing.assert_allclose(found["hit_rate@2"], [1, 1, 0])
    # Two of three fill the list: the ideal has no room for the third.
    np.testing.assert_allclose(found["ndcg@2"], [1, 1, 0])
    np.testing.assert_allclose(found["mrr@2"], [1, 1, 0])


def test_a_query_without_relevant_items_is_refused():
    with pytest.raises(ValueError, match="at least one relevant item"):
        per_query(np.array([1]), [2], np.array([0, 1, 1]))


def test_one_relevant_item_each_is_the_same_with_and_without_splits():
    ranks = np.random.default_rng(0).integers(0, 9, 50)
    for name, value in per_query(ranks, [1, 5]).items():
        split = per_query(ranks, [1, 5], np.arange(51))[name]
        assert value.tobytes() == split.tobytes(), name


@pytest.mark.parametrize("k", [1, 5, 20, None])
def test_ndcg_agrees_with_scikit_learn(k):
    """From scores to metric, by our own ranks; None is the whole ranking."""
    rng = np.random.default_rng(0)
    num_queries, num_items = 50, 40
    scores = rng.permuted(np.tile(np.arange(float(num_items)), (num_queries, 1)), axis=1)
    relevant = rng.random(scores.shape) < 0.2
    relevant[:, 0] = True
    depth = num_items if k is None else k
    ranks, splits = ranks_of(relevant, scores)
    ours = per_query(ranks, [depth], splits)
    assert np.max(np.diff(splits)) > 5
    theirs = [ndcg_score(relevant[[i]], scores[[i]], k=k) for i in range(num_queries)]
    np.testing.assert_allclose(ours[f"ndcg@{depth}"], theirs)


def ranks_of(relevant, scores, seed=0):
    """Ranks of the relevant items, and where those of each query begin and end."""
    splits = np.concatenate([[0], np.cumsum(relevant.sum(axis=1))])
    labels = np.nonzero(relevant)[1]
    uniform = np.random.default_rng(seed).random(len(labels))
    return rank_of_label(scores, labels, uniform, splits), splits


@pytest.mark.parametrize("k", [1, 5, 20])
def test_with_ties_the_expected_ndcg_is_that_of_scikit_learn(k):
    """It averages the gains of tied items; here the same query is shuffled many times."""
    rng = np.random.default_rng(3)
    relevant = rng.random(20) < 0.3
    scores = rng.integers(0, 4, 20).astype(np.float32)
    times = 20_000
    ranks, splits = ranks_of(np.tile(relevant, (times, 1)), np.tile(scores, (times, 1)))
    assert np.diff(splits)[0] >= 4
    ours = per_query(ranks, [k], splits)[f"ndcg@{k}"]
    theirs = ndcg_score(relevant[None], scores[None], k=k)
    assert ours.mean() == pytest.approx(theirs, abs=4 * ours.std() / np.sqrt(times))


def test_recall_hit_rate_and_mrr_are_what_their_definitions_say():
    rng = np.random.default_rng(1)
    scores, relevant = rng.random((50, 30)), rng.random((50, 30)) < 0.2
    relevant[:, 0] = True
    ranks, splits = ranks_of(relevant, scores)
    found = per_query(ranks, [7], splits)
    for row, best in enumerate(np.argsort(-scores, axis=1)[:, :7].tolist()):
        wanted = set(np.flatnonzero(relevant[row]).tolist())
        places = [place for place, item in enumerate(best, 1) if item in wanted]
        assert found["recall@7"][row] == pytest.approx(len(places) / len(wanted))
        assert found["hit_rate@7"][row] == bool(places)
        assert found["mrr@7"][row] == pytest.approx(1 / places[0] if places else 0)


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


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("k", [1, 10, 25])
def test_scores_that_say_nothing_rank_at_chance_level(levels, k):
    """A constant scorer, and one that splits the corpus in two at random: all ties, half ties."""
    num_queries, num_items = 20_000, 50
    rng = np.random.default_rng(0)
    scores = rng.integers(0, levels, (num_queries, num_items)).astype(np.float32)
    labels = rng.integers(0, num_items, num_queries)
    ranks = rank_of_label(scores, labels, rng.random(num_queries))
    assert set(ranks) == set(range(1, num_items + 1))
    found = per_query(ranks, [k])
    place = np.arange(1, num_items + 1)
    for metric, gain in {
        "recall": np.ones(num_items),
        "hit_rate": np.ones(num_items),
        "ndcg": 1 / np.log2(place + 1),
        "mrr": 1 / place,
    }.items():
        # Every rank from 1 to num_items is as likely as any other.
        chance = np.where(place <= k, gain, 0)
        bound = 4 * chance.std() / np.sqrt(num_queries)
        assert found[f"{metric}@{k}"].mean() == pytest.approx(chance.mean(), abs=bound), metric


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("k", [1, 4, 25])
def test_scores_that_say_nothing_are_at_chance_for_several_relevant_items(levels, k):
    """A shuffled corpus: hits are drawn without replacement, so no two share a rank."""
    num_queries, num_items, num_relevant = 20_000, 30, 6
    rng = np.random.default_rng(0)
    scores = rng.integers(0, levels, (num_queries, num_items)).astype(np.float32)
    labels = np.argsort(rng.random(scores.shape), axis=1)[:, :num_relevant].ravel()
    splits = np.arange(num_queries + 1) * num_relevant
    ranks = rank_of_label(scores, labels, rng.random(len(labels)), splits)
    of_query = np.sort(ranks.reshape(num_queries, num_relevant), axis=1)
    assert np.all(np.diff(of_query, axis=1) > 0)
    assert (of_query.min(), of_query.max()) == (1, num_items)
    found = per_query(ranks, [k], splits)
    place = np.arange(1, k + 1)
    first = [comb(num_items - p, num_relevant - 1) / comb(num_items, num_relevant) for p in place]
    discount = 1 / np.log2(place + 1)
    chance = {
        "recall": k / num_items,
        "hit_rate": sum(first),
        "ndcg": discount.sum() * num_relevant / num_items / discount[:num_relevant].sum(),
        "mrr": sum(first / place),
    }
    for metric, expected in chance.items():
        value = found[f"{metric}@{k}"]
        bound = 4 * value.std() / np.sqrt(num_queries) + 1e-9
        assert value.mean() == pytest.approx(expected, abs=bound), metric


def test_labels_rank_alike_with_their_query_s_others_or_alone_where_nothing_ties():
    rng = np.random.default_rng(4)
    scores = rng.permuted(np.tile(np.arange(20.0), (30, 1)), axis=1)
    relevant = rng.random(scores.shape) < 0.3
    relevant[:, 0] = True
    ranks, splits = ranks_of(relevant, scores)
    query, item = np.nonzero(relevant)
    alone = rank_of_label(scores[query], item, np.full(len(item), 0.5))
    np.testing.assert_array_equal(ranks, alone)
    np.testing.assert_array_equal(ranks, 20 - scores[query, item])
    assert splits[-1] == len(ranks)


def test_of_several_labels_those_out_of_reach_have_rank_0_and_take_no_place():
    scores = np.array([[np.nan, -np.inf, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    labels = np.array([0, 1, -1, 2, 3, 0, -1])
    found = rank_of_label(scores, labels, np.zeros(7), np.array([0, 5, 7]))
    np.testing.assert_array_equal(found, [0, 0, 0, 2, 3, 1, 0])


def test_of_two_levels_the_label_ranks_at_chance_within_its_own():
    # Ten items of the higher level: a label there is anywhere in 1 to 10, any other in 11 to 50.
    scores = np.zeros((20_000, 50), np.float32)
    scores[:, :10] = 1
    uniform = np.random.default_rng(0).random(len(scores))
    for label, low, high in ((3, 1, 10), (30, 11, 50)):
        ranks = rank_of_label(scores, np.full(len(scores), label), uniform)
        counts = np.bincount(ranks, minlength=51)
        assert counts[low : high + 1].sum() == len(scores)
        share = 1 / (high - low + 1)
        bound = 4.5 * np.sqrt(share * (1 - share) / len(scores))
        np.testing.assert_allclose(counts[low : high + 1] / len(scores), share, atol=bound)


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
