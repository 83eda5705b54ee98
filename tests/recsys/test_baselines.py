import numpy as np
import pytest

from recsys.baselines import counting_baseline
from recsys.dataset import Interactions

COUNTING = ("popularity", "last_viewed", "markov", "covisitation", "vsknn")


def interactions(rows, length=4):
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
        weight=np.ones(len(rows), np.float32),
        exclusions=None,
    )


def order(name, known, histories, num_items):
    """Items best first for each history; the baseline must not read the test labels."""
    queries = interactions([(9, -1, history) for history in histories])
    scorer = counting_baseline(name, known, queries, num_items)
    scores = scorer.scores(slice(0, len(histories)))
    assert scores.shape == (len(histories), num_items)
    assert scores.dtype == np.float32
    return np.argsort(-scores, axis=1, kind="stable").tolist(), scores


TRAIN = interactions(
    [(0, 3, [1]), (0, 3, [1]), (0, 2, [1]), (1, 2, [0]), (1, 3, [2]), (2, 0, [4, 1]), (3, -1, [1])]
)
VALIDATION = interactions([(4, 2, [1]), (5, 2, [1])])


def test_popularity_counts_labels_of_train_and_validation():
    (found,), _ = order("popularity", [TRAIN, VALIDATION], [[1]], 5)
    assert found[:3] == [2, 3, 0]  # 4, 3 and 1 labels
    (found,), _ = order("popularity", [TRAIN], [[1]], 5)
    assert found[:3] == [3, 2, 0]  # 3 and 2 labels


def test_last_viewed_puts_the_history_first_most_recent_best():
    found, _ = order("last_viewed", [TRAIN, VALIDATION], [[4, 1, 0], [4, 1, 4], []], 5)
    assert found[0][:5] == [0, 1, 4, 2, 3]
    assert found[1][:4] == [4, 1, 2, 3]
    assert found[2][:3] == [2, 3, 0]


def test_markov_orders_by_transitions_then_popularity():
    # After 1: item 2 three times (with validation), 3 twice, 0 once; never 1 or 4.
    found, scores = order("markov", [TRAIN, VALIDATION], [[4, 1], [0, 4], []], 5)
    assert found[0][:3] == [2, 3, 0]
    assert found[1][:3] == [2, 3, 0]  # 4 was never last: popularity
    assert found[2][:3] == [2, 3, 0]
    assert scores[0].min() >= 0


def test_a_seen_transition_beats_any_popularity():
    known = interactions([(0, 0, [1])] * 1000 + [(1, 3, [2])])
    found, _ = order("markov", [known], [[2]], 4)
    assert found[0][:2] == [3, 0]


def test_popularity_decides_between_equal_counts_however_large():
    # 3 * 2^21 transitions to each of two items, one of which has one label more elsewhere: beside
    # such a count, float32 has no room left for a fraction that stands for popularity.
    times = 3 * 2**21
    known = Interactions(
        user=np.zeros(2 * times + 1, np.int64),
        user_id=np.full(2 * times + 1, b"u", np.object_),
        label=np.repeat(np.array([1, 2, 2], np.int32), [times, times, 1]),
        history=np.repeat(np.array([[0], [3]], np.int32), [2 * times, 1], axis=0),
        weight=np.ones(2 * times + 1, np.float32),
        exclusions=None,
    )
    found, scores = order("markov", [known], [[0]], 4)
    assert found[0][:2] == [2, 1]
    assert scores[0, 2] > scores[0, 1]


def test_markov_transitions_are_directed():
    known = interactions([(0, 1, [0])])
    _, scores = order("markov", [known], [[0], [1]], 3)
    assert scores[0, 1] > scores[0, 2]
    assert scores[1, 0] == scores[1, 2]


def test_covisitation_is_the_smoothed_cosine_by_hand():
    known = interactions([(0, 2, [0, 1]), (0, 2, [0, 0]), (1, 3, [1])])
    _, scores = order("covisitation", [known], [[0], [0, 1]], 5)
    from_0 = 2 / np.sqrt((2 + 20) * (2 + 20))
    from_1 = 1 / np.sqrt((2 + 20) * (2 + 20))
    assert scores[0, 2] == pytest.approx(from_0)
    assert scores[1, 2] == pytest.approx(from_0 + from_1)
    assert scores[1, 3] == pytest.approx(1 / np.sqrt((2 + 20) * (1 + 20)))
    assert np.all(scores[:, [0, 1, 4]] < 0)


def test_covisitation_falls_back_to_popularity():
    found, scores = order("covisitation", [TRAIN, VALIDATION], [[], [3]], 5)
    assert [row[:3] for row in found] == [[2, 3, 0], [2, 3, 0]]
    assert np.all((scores >= -1) & (scores < 0))


@pytest.mark.parametrize("name", COUNTING)
def test_blocks_are_parts_of_the_whole_and_may_be_written(name):
    rng = np.random.default_rng(0)
    queries = interactions([(u, 0, rng.integers(0, 5, u % 5).tolist()) for u in range(9)])
    scorer = counting_baseline(name, [TRAIN, VALIDATION], queries, 5)
    whole = scorer.scores(slice(0, 9))
    part = scorer.scores(slice(3, 7))
    np.testing.assert_array_equal(part, whole[3:7])
    part[:] = -np.inf  # what exclusions do must not reach the scorer
    np.testing.assert_array_equal(scorer.scores(slice(3, 7)), whole[3:7])


@pytest.mark.parametrize("name", COUNTING)
def test_a_schema_without_history_leaves_popularity(name):
    known = interactions([(0, 1, []), (0, 1, []), (1, 2, [])], length=0)
    queries = interactions([(5, 0, [])], length=0)
    scores = counting_baseline(name, [known], queries, 3).scores(slice(0, 1))
    assert np.argsort(-scores[0]).tolist() == [1, 2, 0]


@pytest.mark.parametrize("name", COUNTING)
def test_test_labels_are_not_read(name):
    histories = [[1, 0], [2], [3, 4]]
    scores = [
        counting_baseline(
            name, [TRAIN], interactions([(0, label, h) for h in histories]), 5
        ).scores(slice(0, 3))
        for label in (0, 4)
    ]
    np.testing.assert_array_equal(*scores)


def test_an_unknown_baseline_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'knn'.*covisitation.*popularity"):
        counting_baseline("knn", [TRAIN], VALIDATION, 5)
