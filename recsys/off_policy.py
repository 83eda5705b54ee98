"""What a new policy would have earned, from what another one has shown: off-policy estimators.

Each logged choice has the item that was shown, its propensity (the probability that the logging
policy gave it in this context) and the reward. With `w = target probability / propensity`:

- `ips`: mean of `w * reward` (Horvitz and Thompson 1952). Unbiased where the logging policy may
  show all that the new one does.
- `snips`: the same divided by the mean of `w` (Swaminathan and Joachims, "The Self-Normalized
  Estimator for Counterfactual Learning", NIPS 2015): consistent, slightly biased, of less variance.
- `dr`: what a model of rewards expects of the new policy, plus the mean of `w * (reward -
  predicted)` (Dudík, Langford and Li, "Doubly Robust Policy Evaluation and Learning", ICML 2011).
  Unbiased where `ips` is, whatever the model predicts; the better it is, the less it varies.
- `dm`: what the model of rewards expects, alone; as biased as the model is.

Intervals resample contexts: the choices of one are alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recsys.artifacts import Estimate
from recsys.bootstrap import interval, relative_lift, resampled_means

Floats = NDArray[np.float64]

LOGGED = "logged"
_WEIGHT = 1


@dataclass(frozen=True, slots=True)
class Choices:
    """What was shown, and what a new policy makes of it.

    Attributes:
        context: `[n]` codes; those of one context are resampled together.
        propensity: `[n]` of the item that was shown, above 0.
        reward: `[n]`.
        target: `[n]` probability that the new policy shows this item.
        predicted: `[n]` reward that a model expects of this item; None without a model.
        expected: `[n]` reward that it expects of the new policy in this context.
    """

    context: NDArray[np.int64]
    propensity: Floats
    reward: Floats
    target: Floats
    predicted: Floats | None = None
    expected: Floats | None = None

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def weight(self) -> Floats:
        """How many times as often the new policy shows what was shown, `[n]`."""
        weight: Floats = self.target / self.propensity
        return weight


@dataclass(frozen=True, slots=True)
class PolicyValue:
    """Mean reward of a choice.

    Attributes:
        values: by estimator; `logged` is what was earned.
        lifts: relative, over what was earned, by estimator.
        mean_weight: 1 where the log holds what the new policy shows, as often as it should; below 1
            it shows what was never shown, which no estimator but `dm` and `dr` knows of.
        effective_size: choices that would tell as much if all counted alike (Kish).
    """

    values: dict[str, Estimate]
    lifts: dict[str, Estimate]
    mean_weight: Estimate
    effective_size: float


def policy_value(
    choices: Choices, *, samples: int = 1000, confidence: float = 0.95, seed: int = 42
) -> PolicyValue:
    """Estimate the value of the new policy beside that of the log.

    Args:
        choices: at least one.
        samples: of the bootstrap.
        confidence: of the intervals.
        seed: of the resampling.
    """
    columns = _columns(choices)
    table = np.stack(list(columns.values()), axis=1)
    means = dict(zip(columns, table.mean(axis=0), strict=True))
    drawn = resampled_means(table, choices.context, samples, seed)
    values = _values(means)
    replicates = _values(dict(zip(columns, drawn.T, strict=True)))
    weight = choices.weight
    square = float(np.square(weight).sum())
    return PolicyValue(
        values={n: interval(float(v), replicates[n], confidence) for n, v in values.items()},
        lifts={
            name: interval(
                float(relative_lift(value, values[LOGGED], len(choices))),
                relative_lift(replicates[name], replicates[LOGGED], len(choices)),
                confidence,
            )
            for name, value in values.items()
            if name != LOGGED
        },
        mean_weight=interval(float(weight.mean()), drawn[:, _WEIGHT], confidence),
        effective_size=float(weight.sum()) ** 2 / square if square else 0.0,
    )


def _columns(choices: Choices) -> dict[str, Floats]:
    """What the estimators are means of, `[n]` each."""
    weight = choices.weight
    columns = {"reward": choices.reward, "weight": weight, "weighted": weight * choices.reward}
    if choices.predicted is not None and choices.expected is not None:
        correction = weight * (choices.reward - choices.predicted)
        columns |= {"expected": choices.expected, "correction": correction}
    return columns


def _values(means: Mapping[str, Floats]) -> dict[str, Floats]:
    """Estimators by means; of a policy that shows nothing of the log SNIPS is 0."""
    weight = means["weight"]
    values = {
        LOGGED: means["reward"],
        "ips": means["weighted"],
        "snips": np.where(weight > 0, means["weighted"] / np.where(weight > 0, weight, 1.0), 0.0),
    }
    if "expected" in means:
        values["dr"] = means["expected"] + means["correction"]
        values["dm"] = means["expected"]
    return values
