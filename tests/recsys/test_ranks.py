import numpy as np
import pytest

import recsys.ranks
from recsys.dataset import Interactions
from recsys.metrics import per_query
from recsys.ranks import DotProduct, candidate_lists, rank_queries


class Fixed:
    def __init__(self, table):
        self.table = np.asarray(table, np.float32)

    def scores(self, rows):
        return self.table[rows].copy()


def queries(labels, exclusions=None, splits=None):
    n = len(labels) if splits is None else len(splits) - 1
    ragged = None
    if exclusions is not None:
        begins = np.cumsum([0, *map(len, exclusions)])
        ragged = (np.concatenate([np.array(e, np.int32) for e in exclusions]), begins)
    return Interactions(
        user=np.arange(n),
        user_id=np.array([b"u"] * n, np.object_),
        label=np.array(labels, np.int32),
        history=np.zeros((n, 0), np.int32),
        weight=np.ones(n, np.float32),
        exclusions=ragged,
        splits=splits,
    )


def test_ranks_and_lists_by_hand():
    table = [[0.1, 0.3, 0.2], [0.9, 0.5, 0.7], [0.1, 0.2, 0.3]]
    found = rank_queries("model", Fixed(table), queries([2, 0, -1]), 3, 2, 0)
    np.testing.assert_array_equal(found.rank, [2, 1, 0])
    np.testing.assert_array_equal(found.recommended, [[1, 2], [0, 2], [2, 1]])


def test_exclusions_leave_the_ranking_and_the_lists():
    table = [[3, 2, 1], [3, 2, 1], [3, 2, 1]]
    masked = queries([2, 0, 1], [[0, -1], [0], [0, 2]])
    found = rank_queries("model", Fixed(table), masked, 3, 3, 0)
    np.testing.assert_array_equal(found.rank, [2, 0, 1])
    np.testing.assert_array_equal(found.recommended, [[1, 2, -1], [1, 2, -1], [1, -1, -1]])


def test_several_labels_of_a_query_rank_by_hand():
    table = [[0.1, 0.3, 0.2, 0.0], [4, 3, 2, 1], [1, 2, 3, 4]]
    asked = queries([2, 1, 3, 0, -1, 1], [[], [0], []], np.array([0, 2, 3, 6]))
    found = rank_queries("model", Fixed(table), asked, 4, 2, 0)
    np.testing.assert_array_equal(found.rank, [2, 1, 3, 4, 0, 3])
    np.testing.assert_array_equal(found.recommended, [[1, 2], [1, 2], [3, 2]])


@pytest.mark.parametrize("favourite", [1e30, np.inf])
def test_what_is_excluded_never_ranks(favourite):
    """However highly it is scored, whoever is the label and whatever the block."""
    rng = np.random.default_rng(0)
    num_queries, num_items = 300, 12
    excluded = rng.random((num_queries, num_items)) < 0.5
    excluded[0] = True
    table = np.where(excluded, favourite, rng.integers(0, 3, (num_queries, num_items)))
    labels = rng.integers(0, num_items, num_queries)
    masked = queries(labels, [np.flatnonzero(row).tolist() for row in excluded])
    found = rank_queries("model", Fixed(table), masked, num_items, num_items, 0)
    out = excluded[np.arange(num_queries), labels]
    assert np.all(found.rank[out] == 0)
    left = num_items - excluded.sum(axis=1)
    assert np.all((found.rank[~out] >= 1) & (found.rank[~out] <= left[~out]))
    for row, items in enumerate(found.recommended.tolist()):
        listed = [item for item in items if item >= 0]
        assert sorted(listed) == np.flatnonzero(~excluded[row]).tolist()
        assert items == listed + [-1] * excluded[row].sum()


def test_exclusions_change_ranks_as_a_smaller_corpus_would():
    rng = np.random.default_rng(1)
    table = rng.permuted(np.tile(np.arange(12), (200, 1)), axis=1)
    labels = rng.integers(3, 12, 200)
    masked = queries(labels, [[0, 1, 2]] * 200)
    found = rank_queries("model", Fixed(table), masked, 12, 4, 0)
    smaller = rank_queries("model", Fixed(table[:, 3:]), queries(labels - 3), 9, 4, 0)
    np.testing.assert_array_equal(found.rank, smaller.rank)
    np.testing.assert_array_equal(found.recommended, smaller.recommended + 3)


@pytest.mark.parametrize("excluded", [0, 10])
def test_a_constant_scorer_is_at_chance_among_what_is_left(excluded):
    num_queries, num_items, k = 20_000, 50, 10
    labels = np.random.default_rng(2).integers(excluded, num_items, num_queries)
    masked = queries(labels, [list(range(excluded))] * num_queries)
    scorer = Fixed(np.zeros((num_queries, num_items)))
    rank = rank_queries("model", scorer, masked, num_items, k, 0).rank
    left = num_items - excluded
    gain = np.where(np.arange(left) < k, 1 / np.log2(np.arange(left) + 2), 0)
    found = per_query(rank, [k])
    for metric, each in (("recall", gain > 0), ("ndcg", gain)):
        bound = 4 * each.std() / np.sqrt(num_queries)
        assert found[f"{metric}@{k}"].mean() == pytest.approx(each.mean(), abs=bound)


def test_a_list_is_no_longer_than_the_corpus():
    found = rank_queries("model", Fixed([[1, 2]]), queries([0]), 2, 10, 0)
    assert found.recommended.tolist() == [[1, 0]]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("queries_per_block", [1, 7, 1000])
def test_the_block_size_changes_nothing(monkeypatch, queries_per_block, several):
    rng = np.random.default_rng(0)
    table = rng.integers(0, 4, (50, 30))  # many ties
    exclusions = [rng.integers(0, 30, size).tolist() for size in rng.integers(0, 5, 50)]
    splits = np.concatenate([[0], np.cumsum(rng.integers(1, 6, 50))]) if several else None
    labels = rng.integers(-1, 30, 50)
    if several:
        each = [rng.choice(30, size, replace=False) for size in np.diff(splits)]
        labels = np.concatenate(each)
    asked = queries(labels, exclusions, splits)
    whole = rank_queries("model", Fixed(table), asked, 30, 5, 0)
    monkeypatch.setattr(recsys.ranks, "BLOCK_BYTES", 4 * 30 * queries_per_block)
    found = rank_queries("model", Fixed(table), asked, 30, 5, 0)
    np.testing.assert_array_equal(found.rank, whole.rank)
    np.testing.assert_array_equal(found.recommended, whole.recommended)


def test_no_block_is_larger_than_its_bytes(monkeypatch):
    monkeypatch.setattr(recsys.ranks, "BLOCK_BYTES", 4 * 30 * 8)
    sizes = []

    class Watched(Fixed):
        def scores(self, rows):
            sizes.append(rows.stop - rows.start)
            return super().scores(rows)

    rank_queries("model", Watched(np.zeros((50, 30))), queries([0] * 50), 30, 5, 0)
    assert sizes == [8] * 6 + [2]


def test_the_seed_breaks_ties_alike_for_every_scorer():
    asked = queries([0] * 200)
    one, other, reseeded = (
        rank_queries(name, Fixed(np.zeros((200, 10))), asked, 10, 1, seed).rank
        for name, seed in (("model", 0), ("markov", 0), ("model", 1))
    )
    np.testing.assert_array_equal(one, other)
    assert np.any(one != reseeded)
    assert set(one) == set(range(1, 11))


def test_scores_of_seen_items_are_added_to_the_dot_products():
    queries, candidates = np.eye(2, 3, dtype=np.float32), np.eye(4, 3, dtype=np.float32)
    history = np.array([[3, 1, 3], [0, -1, -1]], np.int32)
    repeat = np.array([[0.5, 0.25, 2.0], [-1.0, 9.0, 9.0]], np.float32)
    scores = DotProduct(queries, candidates, repeat, history).scores(slice(0, 2))
    np.testing.assert_allclose(scores, [[1, 0.25, 0, 2.5], [-1, 1, 0, 0]])


@pytest.mark.parametrize("queries_per_block", [3, 100])
def test_candidate_lists_are_the_best_that_are_not_excluded(monkeypatch, queries_per_block):
    monkeypatch.setattr(recsys.ranks, "BLOCK_BYTES", 4 * 6 * queries_per_block)
    table = np.random.default_rng(1).normal(size=(10, 6)).astype(np.float32)
    asked = queries([0] * 10, [[0, 1, 2, 3], [-1], *[[]] * 8])
    blocks = list(candidate_lists("lists", Fixed(table), asked, 6, 4))
    assert [b.queries.start for b in blocks] == list(range(0, 10, min(queries_per_block, 10)))
    items = np.concatenate([b.items for b in blocks])
    scores = np.concatenate([b.scores for b in blocks])
    assert items[0, 2:].tolist() == [-1, -1]
    assert np.isneginf(scores[0, 2:]).all()
    np.testing.assert_array_equal(items[1:], np.argsort(-table[1:], axis=1)[:, :4])
    np.testing.assert_array_equal(scores[1:], -np.sort(-table[1:], axis=1)[:, :4])
