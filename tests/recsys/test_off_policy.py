"""Estimators beside what is known by hand, and on simulated logs of policies of known value."""

import dataclasses

import numpy as np
import pytest

from recsys.off_policy import Choices, policy_value
from recsys.summary import policy_table

CONTEXTS, ITEMS = 6, 5


def test_a_log_of_three_choices_by_hand():
    choices = Choices(
        context=np.arange(3),
        propensity=np.array([0.5, 0.25, 0.8]),
        reward=np.array([1.0, 2.0, 4.0]),
        target=np.array([0.5, 0.5, 0.0]),
        predicted=np.array([0.5, 1.0, 9.0]),
        expected=np.array([0.6, 1.2, 3.0]),
    )
    found = policy_value(choices, samples=50)
    values = {name: estimate.value for name, estimate in found.values.items()}
    assert values == pytest.approx(
        {
            "logged": 7 / 3,
            "ips": (1 * 1 + 2 * 2 + 0) / 3,
            "snips": (1 * 1 + 2 * 2 + 0) / (1 + 2 + 0),
            "dr": (0.6 + 1.2 + 3.0 + 1 * 0.5 + 2 * 1.0 + 0) / 3,
            "dm": (0.6 + 1.2 + 3.0) / 3,
        }
    )
    assert found.lifts["ips"].value == pytest.approx((5 / 3) / (7 / 3) - 1)
    assert found.mean_weight.value == pytest.approx(1)
    assert found.effective_size == pytest.approx(9 / 5)
    assert all(e.low <= e.value <= e.high for e in found.values.values())


def test_a_policy_compared_with_itself_earns_what_was_earned():
    random = np.random.default_rng(1)
    chance, reward = random.uniform(0.1, 1, 40), random.normal(size=40)
    own = Choices(np.arange(40) // 2, chance, reward, chance)
    found = policy_value(own, samples=100)
    assert set(found.values) == {"logged", "ips", "snips"}
    for estimate in found.values.values():
        assert estimate == found.values["logged"]
    assert found.effective_size == pytest.approx(40)


def test_a_policy_that_shows_nothing_of_the_log():
    nothing = Choices(np.arange(4), np.full(4, 0.5), np.ones(4), np.zeros(4))
    found = policy_value(nothing, samples=20)
    assert found.values["ips"].value == found.values["snips"].value == 0
    assert found.mean_weight.high == 0
    assert found.effective_size == 0
    told = policy_table(found).splitlines()
    assert told[2].split() == ["ips", "0.0000", "0.0000", "to", "0.0000", "-100.0%",
                               "-100.0%", "to", "-100.0%"]  # fmt: skip


class World:
    """Contexts of equal frequency, a mean reward of each item, and two policies."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.mean = self.random.uniform(0.05, 0.9, (CONTEXTS, ITEMS))
        self.logging, self.target = self.random.dirichlet(np.full(ITEMS, 2.0), (2, CONTEXTS))
        self.value = float((self.target * self.mean).sum(axis=1).mean())

    def log(self, size, model):
        """Clicks on what the logging policy draws; `model` predicts rewards, `[CONTEXTS, ITEMS]`."""
        context = self.random.integers(0, CONTEXTS, size)
        draws = self.random.random(size)[:, np.newaxis]
        item = (np.cumsum(self.logging[context], axis=1) < draws).sum(axis=1).clip(max=ITEMS - 1)
        return Choices(
            context=np.arange(size),
            propensity=self.logging[context, item],
            reward=(self.random.random(size) < self.mean[context, item]).astype(float),
            target=self.target[context, item],
            predicted=model[context, item],
            expected=(self.target * model).sum(axis=1)[context],
        )


def test_intervals_hold_the_value_of_the_policy_as_often_as_they_say():
    """Of 95% intervals of 100 logs at least 88 hold the value (P = .995 where each has 94%)."""
    world = World(2)
    hits = dict.fromkeys(("ips", "snips", "dr"), 0)
    for _ in range(100):
        found = policy_value(world.log(600, world.mean), samples=200)
        for name in hits:
            hits[name] += found.values[name].low <= world.value <= found.values[name].high
    assert min(hits.values()) >= 88


def test_the_doubly_robust_estimate_is_unbiased_whatever_the_model_predicts():
    """And less spread with a good model; the model alone is as wrong as its predictions."""
    world = World(3)
    wrong = np.full_like(world.mean, 0.9)
    found = {"ips": [], "wrong": [], "good": [], "dm": []}
    for _ in range(400):
        choices = world.log(200, world.mean)
        bad = dataclasses.replace(choices, predicted=np.full(200, 0.9), expected=np.full(200, 0.9))
        values = policy_value(choices, samples=2).values
        found["good"].append(values["dr"].value)
        found["ips"].append(values["ips"].value)
        of_wrong = policy_value(bad, samples=2).values
        found["wrong"].append(of_wrong["dr"].value)
        found["dm"].append(of_wrong["dm"].value)
    assert np.mean(found["dm"]) == pytest.approx(wrong[0, 0])
    assert abs(wrong[0, 0] - world.value) > 0.2
    for name in ("ips", "wrong", "good"):
        error = np.std(found[name]) / np.sqrt(len(found[name]))
        assert abs(np.mean(found[name]) - world.value) < 4 * error
    assert np.std(found["good"]) < 0.8 * np.std(found["ips"])
