import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from recsys.list_config import EpsilonGreedy, Thompson
from serving_export.exploration import Exploration, explains

EPSILON = EpsilonGreedy(kind="epsilon_greedy", epsilon=0.3, slots=2, pool=8, seed=1)
THOMPSON = Thompson(kind="thompson", scale=0.7, slots=2, pool=8, seed=1)
SCORES = np.array([3, 2.5, 2, 1.6, 1.5, 1.2, 0.9, 0.8, 0.4, 0.1], np.float32)
ROWS = np.array([7, 3, 12, 0, 5, 1, 9, 4, 2, 6], np.int32)


def explored(settings, scores, ends):
    """Answers to `len(ends)` queries with the same list."""
    times = len(ends)
    lists = np.tile(ROWS, (times, 1)), np.tile(scores, (times, 1)), tf.constant(ends, tf.int32)
    return [part.numpy() for part in tf.function(Exploration(settings).explored)(*lists)]


def chances(settings, positions):
    """By the formulas: of the candidates at these positions of the list."""
    if isinstance(settings, Thompson):
        weights = np.exp(SCORES[positions] / settings.scale)
        return weights / weights.sum()
    found = np.full(len(positions), settings.epsilon / len(positions))
    found[0] += 1 - settings.epsilon
    return found


@pytest.mark.parametrize("settings", [EPSILON, THOMPSON], ids=lambda s: s.kind)
def test_draws_are_as_frequent_as_their_propensities_say(settings):
    """Places 4 and 5 of six; candidates are those of the first eight that are not above."""
    times = 20_000
    rows, scores, propensities = explored(settings, SCORES, [6] * times)
    place = {row: n for n, row in enumerate(ROWS)}
    positions = np.vectorize(place.get)(rows)
    np.testing.assert_array_equal(scores, SCORES[positions])
    np.testing.assert_array_equal(rows[:, :4], np.tile(ROWS[:4], (times, 1)))
    assert (propensities[:, :4] == 1).all()
    first = chances(settings, np.arange(4, 8))
    np.testing.assert_allclose(propensities[:, 4], first[positions[:, 4] - 4], rtol=1e-5)
    seen = np.bincount(positions[:, 4] - 4, minlength=4) / times
    # Five standard deviations of a share.
    np.testing.assert_array_less(np.abs(seen - first), 5 * np.sqrt(first / times))
    joint = np.zeros((4, 4))
    for one in range(4):
        rest = [n for n in range(4, 8) if n != one + 4]
        then = chances(settings, np.array(rest))
        own = positions[:, 4] == one + 4
        found = then[[rest.index(n) for n in positions[own, 5]]]
        np.testing.assert_allclose(propensities[own, 5], found, rtol=1e-5)
        joint[one, np.array(rest) - 4] = first[one] * then
    seen = np.zeros((4, 4))
    np.add.at(seen, (positions[:, 4] - 4, positions[:, 5] - 4), 1 / times)
    assert joint.sum() == pytest.approx(1)
    np.testing.assert_array_less(np.abs(seen - joint), 5 * np.sqrt(joint / times) + 1e-9)


@pytest.mark.parametrize("settings", [EPSILON, THOMPSON], ids=lambda s: s.kind)
def test_lists_of_any_length(settings):
    """None, shorter than the slots, up to the pool, and behind it, where nothing is drawn."""
    rows, _, propensities = explored(settings, SCORES, [0, 1, 8, 9, 10])
    place = ROWS.tolist().index(rows[1, 0])
    assert propensities[1, 0] == pytest.approx(chances(settings, np.arange(8))[place], 1e-5)
    for n, end in enumerate([0, 1, 8, 9, 10]):
        assert len(set(rows[n, :end])) == end
        assert set(rows[n, :end]) <= set(ROWS[: max(end, 8)])
    # Two candidates of two places; one of the first of two; none at all.
    assert (propensities[2, :6] == 1).all()
    assert propensities[2, 7] == 1
    assert propensities[2, 6] < 1
    assert (propensities[3:] == 1).all()
    np.testing.assert_array_equal(rows[3:], np.tile(ROWS, (2, 1)))


@pytest.mark.parametrize("settings", [EPSILON, THOMPSON], ids=lambda s: s.kind)
def test_where_little_is_left(settings):
    few = np.where(np.arange(10) < 5, SCORES, -np.inf).astype(np.float32)
    rows, scores, propensities = explored(settings, few, [6] * 50)
    assert {frozenset(row[:5]) for row in rows} == {frozenset(ROWS[:5])}
    assert (propensities[:, 4] == 1).all()  # one candidate is left for the first slot
    assert (propensities[:, 5] == 0).all()
    assert np.isneginf(scores[:, 5]).all()
    nothing = explored(settings, np.full(10, -np.inf, np.float32), [6] * 3)
    assert np.isneginf(nothing[1]).all()
    assert (nothing[2] == 0).all()


def test_a_seed_repeats_the_draws():
    again = [explored(EPSILON, SCORES, [6] * 200)[0].tolist() for _ in range(2)]
    assert again[0] == again[1]


#: A training may have made this process deterministic, in which nothing is drawn without a seed.
FRESH = """
import tensorflow as tf
from recsys.list_config import EpsilonGreedy
from serving_export.exploration import Exploration

settings = EpsilonGreedy(kind="epsilon_greedy", epsilon=1.0, slots=2, pool=40)
explore = tf.function(Exploration(settings).explored)
lists = tf.range(50)[tf.newaxis], tf.linspace([5.0], [1.0], 50, axis=1), tf.constant([20])
print(explore(*lists)[0][0, 18:20].numpy().tolist())
"""


def test_without_a_seed_each_process_draws_others():
    command = [sys.executable, "-c", FRESH]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate()[0] for process in started}
    assert all(process.returncode == 0 for process in started)
    # Of 22 x 21 pairs.
    assert len(answers) > 1


@pytest.mark.parametrize("settings", [EPSILON, THOMPSON], ids=lambda s: s.kind)
def test_the_check_takes_what_the_graph_draws_and_nothing_else(settings):
    rows, _, propensities = explored(settings, SCORES, [6] * 300)
    whole = np.full((300, 20), -np.inf, np.float32)
    whole[:, ROWS] = SCORES
    answer = rows[:, :6], propensities[:, :6]
    assert explains(settings, whole, *answer, arranged=False).all()
    assert not explains(settings, whole, answer[0], 0.9 * answer[1], arranged=False).any()
    other = settings.model_copy(update={"epsilon": 0.6} if settings is EPSILON else {"scale": 2.0})
    assert explains(other, whole, *answer, arranged=False).mean() < 0.5
    repeated = answer[0].copy()
    repeated[:, 4] = repeated[:, 0]
    assert not explains(settings, whole, repeated, answer[1], arranged=False)[:, 0].any()
    beyond = answer[0].copy()
    beyond[:, 5] = ROWS[8]
    assert not explains(settings, whole, beyond, answer[1], arranged=False)[:, 1].any()
    if settings is EPSILON:
        # The next best with the chance of the others, and the other way round.
        turned = np.where(answer[1] > 0.5, 0.3 / 4, 0.7 + 0.3 / 4).astype(np.float32)
        assert not explains(settings, whole, answer[0], turned, arranged=False)[:, 0].any()
