import numpy as np
import pytest

from recsys.dataset import Interactions
from training import als
from training.als import AlsScorer, als_baseline, fit_item_factors, fold_in, user_item_weights


def interactions(rows, weight=None, length=4):
    """Build a split from (user, label, history) triples."""
    history = np.full((len(rows), length), -1, np.int32)
    for row, (_, _, items) in enumerate(rows):
        history[row, : len(items)] = items
    user_id = np.array([str(user).encode() for user, _, _ in rows], np.object_)
    return Interactions(
        user=np.unique(user_id.astype(bytes), return_inverse=True)[1].astype(np.int64),
        user_id=user_id,
        label=np.array([label for _, label, _ in rows], np.int32),
        history=history,
        weight=np.array(weight or [1.0] * len(rows), np.float32),
        exclusions=None,
    )


def two_groups():
    """Users of group 0 take items 0 to 5 only, users of group 1 items 6 to 11 only."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        items = rng.permutation(6)[:4] + 6 * (user % 2)
        rows += [(f"ü{user}", items[i], items[:i].tolist()) for i in range(1, 4)]
    return interactions(rows)


def test_pairs_sum_weights_over_splits_and_take_in_what_was_only_viewed():
    train = interactions([("b", 1, [0]), ("b", 1, [0, 1]), ("a", 2, [1])], [1.0, 4.0, 2.0])
    validation = interactions([("b", 1, [0, 1]), ("b", -1, [0])], [0.5, 1.0])
    table = user_item_weights([train, validation], 3)
    found = {(r["user"], r["item"]): r["weight"] for r in table.to_pylist()}
    assert found == {(0, 2): 2.0, (0, 1): 1.0, (1, 1): 5.5, (1, 0): 1.0}
    assert str(table.schema.field("user").type) == str(table.schema.field("item").type) == "int32"


def test_fold_in_is_the_closed_form():
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(6, 3)).astype(np.float32)
    history = np.array([[4, 1, 4, -1], [2, -1, -1, -1], [-1, -1, -1, -1]], np.int32)
    found = fold_in(history, factors, factors.T.astype(float) @ factors)
    y = factors.astype(float)
    for row, counts in enumerate(({4: 2, 1: 1}, {2: 1})):
        c = np.eye(6)
        p = np.zeros(6)
        for item, count in counts.items():
            c[item, item] += 40 * count
            p[item] = 1
        penalty = 0.1 * len(counts) * np.eye(3)
        np.testing.assert_allclose(found[row], np.linalg.solve(y.T @ c @ y + penalty, y.T @ c @ p))
    np.testing.assert_array_equal(found[2], 0)


@pytest.mark.spark
def test_fold_in_of_a_training_user_gives_what_spark_learned_for_it(spark, monkeypatch):
    from pyspark.ml.recommendation import ALSModel

    users = {}
    learned_items = ALSModel.itemFactors.fget

    def keep_users(model):
        for row in model.userFactors.collect():
            users[row["id"]] = row["features"]
        return learned_items(model)

    monkeypatch.setattr(ALSModel, "itemFactors", property(keep_users))
    # Each user once, with its whole history: what ALS saw of it is what is folded in.
    train = two_groups()
    whole = {}
    for user, label, items in zip(train.user, train.label, train.history, strict=True):
        whole.setdefault(int(user), set()).update([int(label), *items[items >= 0].tolist()])
    history = np.array([sorted(whole[user]) for user in sorted(whole)], np.int32)
    factors = fit_item_factors(spark, user_item_weights([train], 12), 12, 0)
    found = fold_in(history, factors, factors.T.astype(float) @ factors)
    assert len(users) == 40
    np.testing.assert_allclose(found, [users[u] for u in sorted(users)], atol=2e-3)


@pytest.mark.spark
def test_unseen_users_get_the_items_of_their_kind(spark, monkeypatch):
    monkeypatch.setattr(als, "_RANK", 2)  # as many as there are kinds: nothing to overfit with
    train = two_groups()
    queries = interactions([("new", 0, [0, 1]), ("newer", 0, [7]), ("none", 0, [])])
    scorer, same, other = (als_baseline(spark, [train], queries, 13, seed) for seed in (0, 0, 1))
    scores = scorer.scores(slice(0, 3))
    assert scores.shape == (3, 13)
    assert scores.dtype == np.float32
    assert set(np.argsort(-scores[0])[:6]) == set(range(6))
    assert set(np.argsort(-scores[1])[:6]) == set(range(6, 12))
    assert scores[0, 12] == scores[1, 12] == 0  # item 12 was never taken
    counts = np.bincount(train.label, minlength=13)
    assert np.all(np.diff(counts[np.argsort(-scores[2], kind="stable")]) <= 0)
    np.testing.assert_array_equal(same.scores(slice(0, 3)), scores)
    assert np.any(other.scores(slice(0, 2)) != scores[:2])


def test_blocks_are_parts_of_the_whole():
    rng = np.random.default_rng(0)
    queries = interactions([(u, 0, rng.integers(0, 6, u % 5).tolist()) for u in range(9)])
    scorer = AlsScorer(rng.normal(size=(6, 3)).astype(np.float32), [queries], queries)
    np.testing.assert_allclose(scorer.scores(slice(3, 7)), scorer.scores(slice(0, 9))[3:7], 1e-5)


def test_without_spark_the_error_says_what_to_do():
    train = two_groups()
    with pytest.raises(ValueError, match=r"evaluation\.baselines has `als`"):
        als_baseline(None, [train], train, 12, 0)


def test_fold_in_without_any_history_column_falls_back_to_popularity():
    queries = interactions([("a", 1, []), ("b", 1, []), ("c", 0, [])], length=0)
    scores = AlsScorer(np.ones((3, 2), np.float32), [queries], queries).scores(slice(0, 3))
    assert np.argsort(-scores[0]).tolist() == [1, 0, 2]
