from dataclasses import replace

import numpy as np
import pytest

import recsys.session_knn
from recsys.dataset import Interactions
from recsys.session_knn import SessionKnn, known_sessions


def interactions(rows, length=4, timed=True):
    """Build a split from (user, time, history, label)."""
    history = np.full((len(rows), length), -1, np.int32)
    for row, (_, _, items, _) in enumerate(rows):
        history[row, : len(items)] = items
    user_id = np.array([str(user).encode() for user, *_ in rows], np.object_)
    return Interactions(
        user=np.unique(user_id.astype(bytes), return_inverse=True)[1].astype(np.int64),
        user_id=user_id,
        label=np.array([label for *_, label in rows], np.int32),
        history=history,
        weight=np.ones(len(rows), np.float32),
        exclusions=None,
        at=np.array([at for _, at, _, _ in rows], np.int64) if timed else None,
    )


def examples(sessions, length=4, timed=True):
    """Every position of every session that has an item before it; a session's times are its own."""
    return interactions(
        [
            (f"s{number}", 100 * number + place, items[max(0, place - length) : place], label)
            for number, items in enumerate(sessions)
            for place, label in enumerate(items)
            if place > 0
        ],
        length,
        timed,
    )


def queries(histories, length=4):
    return interactions([("q", 0, history, -1) for history in histories], length)


def permuted(split, seed):
    order = np.random.default_rng(seed).permutation(len(split))
    names = ("user", "user_id", "label", "history", "weight")
    moved = {name: getattr(split, name)[order] for name in names}
    return replace(split, **moved, at=None if split.at is None else split.at[order])


def items_of(known, num_items):
    held = known_sessions(known, num_items)
    assert set(held.data) <= {1}
    return [held.indices[a:b].tolist() for a, b in zip(held.indptr, held.indptr[1:], strict=False)]


def best(known, histories, num_items):
    scores = SessionKnn(known, queries(histories), num_items).scores(slice(0, len(histories)))
    assert scores.shape == (len(histories), num_items)
    assert scores.dtype == np.float32
    return np.argsort(-scores, axis=1, kind="stable").tolist()


def naive(sessions, history, num_items, levels):
    """The published method for one query, in loops; sessions are from the oldest on."""
    position = {item: place for place, item in enumerate(history, 1)}
    sharing = [s for s in reversed(sessions) if position.keys() & set(s)]
    sharing = sharing[: recsys.session_knn._SAMPLE]
    sharing.sort(key=lambda s: -sum(position[item] for item in position.keys() & set(s)))
    scores = dict.fromkeys(range(num_items), 0.0)
    for session in sharing[: recsys.session_knn._NEIGHBOURS]:
        shared = position.keys() & set(session)
        similarity = sum(position[item] for item in shared) / len(history)
        step = 1 + min(history[::-1].index(item) for item in shared)
        for item in set(session):
            scores[item] += similarity / step
    return sorted(scores, key=lambda item: (-round(scores[item], 6), -levels[item], item))


def test_scores_by_hand():
    # The query is 0, 1, 2 with the weights 1, 2, 3. Session 0 shares 0 and 1: (1 + 2) / step 2;
    # session 1 shares 2: 3 / step 1; session 2 shares 0: 1 / step 3.
    known = [examples([[0, 1, 3], [2, 4], [0, 5], [6, 7]])]
    (found,) = best(known, [[0, 1, 2]], 9)
    # 2 and 4 have 3; then 0 with 1.5 + 1/3, 1 and 3 with 1.5, 5 with 1/3. Labels break the ties.
    assert found == [4, 2, 0, 1, 3, 5, 7, 6, 8]


@pytest.mark.parametrize(("sample", "neighbours"), [(1000, 100), (6, 3), (3, 3)])
def test_agrees_with_loops_over_sessions(monkeypatch, sample, neighbours):
    monkeypatch.setattr(recsys.session_knn, "_SAMPLE", sample)
    monkeypatch.setattr(recsys.session_knn, "_NEIGHBOURS", neighbours)
    monkeypatch.setattr(recsys.session_knn, "_QUERIES", 7)
    rng = np.random.default_rng(0)
    sessions = [rng.integers(0, 12, size).tolist() for size in rng.integers(2, 9, 40)]
    histories = [rng.integers(0, 14, size).tolist() for size in rng.integers(1, 5, 50)]
    known = examples(sessions)
    levels = np.bincount(known.label, minlength=14)
    expected = [naive(sessions, history, 14, levels) for history in histories]
    assert best([permuted(known, 1)], histories, 14) == expected


def test_what_no_neighbour_holds_follows_by_popularity():
    known = [examples([[0, 1], [2, 3], [2, 3], [3, 4]])]
    found = best(known, [[0], [5], []], 6)
    assert found[0] == [1, 0, 3, 4, 2, 5]  # 1 and 0 of the neighbour, popular or not
    assert found[1] == found[2] == [3, 1, 4, 0, 2, 5]


def test_equal_scores_are_ordered_by_popularity():
    known = [examples([[0, 1], [0, 2], [3, 2]])]
    (found,) = best(known, [[0]], 4)
    assert found[:3] == [0, 2, 1]


def test_the_most_recent_sessions_are_sampled(monkeypatch):
    monkeypatch.setattr(recsys.session_knn, "_SAMPLE", 2)
    known = [permuted(examples([[0, 1]] * 5 + [[0, 2], [0, 3]]), 0)]
    (found,) = best(known, [[0]], 5)
    assert set(found[:3]) == {0, 2, 3}


def test_without_times_the_sample_is_random_and_always_the_same(monkeypatch):
    monkeypatch.setattr(recsys.session_knn, "_SAMPLE", 20)
    known = examples([[0, 1 + number] for number in range(60)], timed=False)
    first, second = (best([permuted(known, seed)], [[0]], 61)[0] for seed in (0, 1))
    assert first == second
    sampled = set(first[:21]) - {0}
    assert len(sampled) == 20
    assert 5 < sum(item <= 30 for item in sampled) < 15


def test_sessions_are_rebuilt_from_shuffled_examples():
    # Longer than the history is, and with an item that is seen twice.
    known = examples([[0, 1], [3, 4, 5, 6, 7, 8, 3], [2, 9]])
    expected = [[2, 9], [3, 4, 5, 6, 7, 8], [0, 1]]
    assert items_of([permuted(known, 0)], 10) == expected
    assert items_of([permuted(replace(known, at=known.at // 100), 1)], 10) == expected


def test_a_user_goes_on_from_train_to_validation():
    train = interactions([("u", 1, [0], 1), ("v", 5, [4], 2)])
    validation = interactions([("u", 9, [0, 1], 3)])
    assert items_of([train, validation], 5) == [[0, 1, 3], [2, 4]]


def test_sessions_of_one_user_are_told_apart():
    known = interactions(
        [
            ("u", 1, [0], 1),
            ("u", 2, [2], 3),
            ("u", 3, [2, 3], 4),
            ("u", 4, [1], 5),
            ("v", 0, [1], 5),
        ]
    )
    assert items_of([permuted(known, 3)], 6) == [[1, 5], [2, 3, 4], [0, 1], [1, 5]]


def test_a_first_click_belongs_to_the_session_it_begins():
    known = interactions([("u", 1, [], 0), ("u", 2, [0], 1), ("u", 7, [], 2), ("u", 8, [2], 0)])
    assert items_of([known], 3) == [[0, 2], [0, 1]]


def test_labels_outside_the_corpus_leave_the_rest_of_the_session():
    known = interactions([("u", 1, [0], -1), ("u", 2, [0], 1), ("v", 0, [], -1)])
    assert items_of([known], 3) == [[0, 1], []]
