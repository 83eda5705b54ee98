"""What a model has to show before it replaces the champion: comparisons with their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.artifacts import (
    RETRIEVAL,
    ArtifactError,
    Check,
    Estimate,
    EvaluationReport,
    IndexReport,
)
from recsys.bootstrap import paired_lift
from recsys.config import RunConfig
from recsys.metrics import per_query

#: Baselines that count clicks. ALS is a model of its own: reported, but it does not gate.
COUNTING_BASELINES = ("popularity", "last_viewed", "markov", "covisitation", "vsknn")


@dataclass(frozen=True, slots=True)
class Comparison:
    """A relative lift beside the least one that is asked for.

    The lift must be so large, and its interval must exclude that there is none; with a negative
    margin, that the loss is larger than it.
    """

    rival: str
    metric: str
    lift: Estimate
    least: float

    @property
    def holds(self) -> bool:
        """Whether the lift suffices, beyond what chance explains."""
        return self.lift.value >= self.least and self.lift.low > min(self.least, 0.0)

    @property
    def check(self) -> Check:
        """The numbers."""
        return Check(
            what=f"{self.metric} over {self.rival}",
            value=self.lift.value,
            low=self.lift.low,
            high=self.lift.high,
            limit=self.least,
            holds=self.holds,
        )

    def __str__(self) -> str:
        enough = f"at least {self.least:+.1%} and " if self.least > 0 else ""
        asked = f"{enough}an interval above {min(self.least, 0.0):+.1%}"
        return (
            f"{self.metric} {self.lift.value:+.1%} over {self.rival} "
            f"(interval {self.lift.low:+.1%} to {self.lift.high:+.1%}; "
            f"{'passes' if self.holds else 'fails'}, {asked} is asked for)"
        )


@dataclass(frozen=True, slots=True)
class Limit:
    """A measured value beside the least or the most that is allowed; `form` says how to print."""

    what: str
    value: float
    limit: float
    at_least: bool
    form: str

    @property
    def holds(self) -> bool:
        """Whether the value keeps the limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def check(self) -> Check:
        """The numbers."""
        return Check(what=self.what, value=self.value, limit=self.limit, holds=self.holds)

    def __str__(self) -> str:
        return (
            f"{self.what} {self.form.format(self.value)} ({'passes' if self.holds else 'fails'}, "
            f"at {'least' if self.at_least else 'most'} {self.form.format(self.limit)} is allowed)"
        )


def against_baselines(config: RunConfig, report: EvaluationReport) -> list[Comparison]:
    """Compare with each counting baseline that was evaluated, and two stages with the first alone.

    Raises:
        ArtifactError: none was, or the report lacks the metric of the gate.
    """
    gate = config.registry.gate
    rivals = [name for name in COUNTING_BASELINES if name in report.lifts]
    if not rivals:
        raise ArtifactError(
            f"the evaluation holds none of the baselines that gate a promotion: add one of "
            f"{list(COUNTING_BASELINES)} to evaluation.baselines and run `recsys evaluate` again"
        )
    least = dict.fromkeys(rivals, gate.min_lift_over_baselines)
    if RETRIEVAL in report.lifts:
        # A second stage must earn its place, but not by the margin over counting clicks.
        least[RETRIEVAL] = min(0.0, gate.min_lift_over_baselines)
    return [
        Comparison(name, gate.metric, _lift(report, name, gate.metric), asked)
        for name, asked in least.items()
    ]


def against_champion(
    config: RunConfig, report: EvaluationReport, champion: EvaluationReport, version: str
) -> Comparison:
    """Compare with the champion, query by query.

    Raises:
        ArtifactError: the reports are not about the same queries.
    """
    gate = config.registry.gate
    ours, theirs = _arrays(report), _arrays(champion)
    same = all(np.array_equal(ours[name], theirs[name]) for name in ("user", "label", "splits"))
    if not same or report.data_fingerprint != champion.data_fingerprint:
        raise ArtifactError(
            f"{report.directory} and {champion.directory} evaluate different queries: the "
            f"champion must be evaluated on the test window of this run; "
            f"run `recsys promote` again with both reports of one run"
        )
    k = int(gate.metric.split("@")[1])
    lift = paired_lift(
        per_query(ours["rank_model"], [k], ours["splits"])[gate.metric],
        per_query(theirs["rank_model"], [k], theirs["splits"])[gate.metric],
        ours["user"],
        samples=config.evaluation.bootstrap_samples,
        confidence=config.evaluation.confidence,
        seed=config.seed,
    )
    rival = f"champion version {version}"
    return Comparison(rival, gate.metric, lift, gate.min_lift_over_champion)


def against_slices(
    config: RunConfig, report: EvaluationReport, champion: EvaluationReport, version: str
) -> list[Limit]:
    """Compare slice by slice with the champion: a mean can rise while some users lose."""
    gate = config.registry.gate
    if gate.max_slice_drop is None:
        return []
    limits = []
    for name, buckets in report.slices.items():
        for bucket, ours in buckets.items():
            theirs = champion.slices.get(name, {}).get(bucket, {}).get(gate.metric, 0.0)
            if ours["queries"] >= gate.min_slice_queries and theirs > 0:
                what = f"{gate.metric} of {name}={bucket} against champion version {version}"
                change = ours[gate.metric] / theirs - 1
                limits.append(Limit(what, change, -gate.max_slice_drop, True, "{:+.1%}"))
    return limits


def of_index(config: RunConfig, index: IndexReport) -> list[Limit]:
    """Compare the index with the limits that the config sets."""
    gate = config.registry.gate
    wanted = [
        (f"recall@{index.k} of the index", index.recall, gate.min_index_recall, True, "{:.4f}"),
        ("search for a query", index.milliseconds_per_query, gate.max_index_milliseconds, False,
         "{:.3f} ms"),
        ("size of the index", float(index.bytes), gate.max_index_bytes, False, "{:,.0f} bytes"),
    ]  # fmt: skip
    return [
        Limit(what, value, limit, at_least, form)
        for what, value, limit, at_least, form in wanted
        if limit is not None
    ]


def _lift(report: EvaluationReport, baseline: str, metric: str) -> Estimate:
    try:
        return report.lifts[baseline][metric]
    except KeyError:
        raise ArtifactError(
            f"the evaluation lacks {metric} over {baseline}: registry.gate.metric must be one of "
            f"{sorted(report.lifts[baseline])}"
        ) from None


def _arrays(report: EvaluationReport) -> dict[str, NDArray[Any]]:
    """Return user, label, rank of each label, and splits: without them a query has one label."""
    with np.load(report.directory / report.per_query) as stored:
        arrays = {name: stored[name] for name in ("user", "label", "rank_model")}
        splits = stored["splits"] if "splits" in stored else np.arange(len(arrays["user"]) + 1)
    return arrays | {"splits": splits}
