"""What a person reads at the end of a run, as plain text."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.artifacts import (
    Estimate,
    EvaluationReport,
    ExportedModel,
    IndexReport,
    Promotion,
    RegisteredModel,
    Scoring,
)
from recsys.drift_report import DriftReport, Finding
from recsys.tuning_report import TuningReport

if TYPE_CHECKING:
    from recsys.off_policy import PolicyValue

_SHOWN = ("recall", "ndcg", "mrr", "coverage", "novelty")
_HISTORY = 5


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A user's latest items, oldest first, and what is recommended, best first; readable names."""

    user: str
    history: Sequence[str]
    items: Sequence[tuple[str, float]]


def metrics_table(report: EvaluationReport, k: int) -> str:
    """Rows of model and baselines, columns of metrics at k; the model with its intervals."""
    metrics = [f"{name}@{k}" for name in _SHOWN]
    rows = [["", *metrics], ["model", *(f"{report.model[m].value:.4f}" for m in metrics)]]
    rows.append(["", *(_interval(report.model[m]) for m in metrics)])
    for name, values in report.baselines.items():
        rows.append([name, *(f"{values[m].value:.4f}" for m in metrics)])
    return _aligned(rows)


def policy_table(value: PolicyValue) -> str:
    """What a new policy would have earned by each estimator, beside what the log has."""
    rows = [["estimator", "reward", "interval", "lift", "interval"]]
    for name, estimate in value.values.items():
        row = [name, f"{estimate.value:.4f}", f"{estimate.low:.4f} to {estimate.high:.4f}"]
        if name in value.lifts:
            lift = value.lifts[name]
            row += [f"{lift.value:+.1%}", f"{lift.low:+.1%} to {lift.high:+.1%}"]
        rows.append([*row, *[""] * (5 - len(row))])
    return _aligned(rows)


def lifts_table(report: EvaluationReport, metric: str) -> str:
    """Relative lift of the model over each baseline, with its interval."""
    rows = [[f"lift in {metric} over", "", "interval"]]
    for name, lifts in report.lifts.items():
        lift = lifts[metric]
        rows.append([name, f"{lift.value:+.1%}", f"{lift.low:+.1%} to {lift.high:+.1%}"])
    return _aligned(rows)


def export_lines(exported: ExportedModel) -> list[str]:
    """Index and folders of the two variants."""
    index = exported.index
    return [
        f"index      {index.kind}, recall@{index.k} {index.recall:.4f} against exact search, "
        f"{index.bytes / 2**20:.1f} MiB, {index.milliseconds_per_query:.3f} ms a query in batches",
        *(f"{name:10} {exported.directory / path}" for name, path in exported.variants.items()),
    ]


def index_table(report: IndexReport) -> str:
    """Settings that were tried, fastest first; `*` marks the one that was chosen."""
    rows = [["index", f"recall@{report.k}", "ms a query", "MiB", "settings"]]
    for point in report.curve:
        same = (point.kind, point.parameters) == (report.kind, report.parameters)
        settings = " ".join(f"{name}={value:g}" for name, value in point.parameters.items())
        figures = [f"{point.recall:.4f}", f"{point.milliseconds_per_query:.4f}"]
        size = f"{point.bytes / 2**20:.1f}"
        rows.append([f"{point.kind}{' *' if same else ''}", *figures, size, settings])
    return _aligned(rows)


def decision_lines(
    registered: RegisteredModel, promotion: Promotion | None, scoring: Scoring | None
) -> list[str]:
    """Version, verdict of the gate, and where the scores are."""
    lines = [f"version    {registered.uri} (MLflow run {registered.run_id})"]
    if promotion is not None:
        verdict = f"promoted to {promotion.alias}" if promotion.promoted else "not promoted"
        lines.append(f"gate       {verdict}")
        lines += [f"           - {reason}" for reason in promotion.reasons]
    if scoring is not None:
        place = scoring.directory / scoring.destination
        lines.append(
            f"scores     {scoring.num_users} users, top {scoring.k}, by version "
            f"{scoring.model_version}: {place if place.exists() else scoring.destination}"
        )
    return lines


def recommendation_lines(shown: Sequence[Recommendation]) -> list[str]:
    """Users with their latest items and what is recommended to them."""
    lines = []
    for one in shown:
        recent = " > ".join(one.history[-_HISTORY:]) or "nothing yet"
        lines += [f"user {one.user}: {recent}"]
        lines += [
            f"  {place}. {name}  ({score:.3f})"
            for place, (name, score) in enumerate(one.items, start=1)
        ]
    return lines


def impressions_table(impressions: Mapping[str, Mapping[str, float]]) -> str:
    """How both stages, and the tasks of the second, order and rate the candidates."""
    shown = ("auc", "user_auc", "request_auc", "ndcg@10", "mrr", "log_loss", "calibration_error")
    rows = [["of the ranked", *shown]]
    for name, values in impressions.items():
        # Scores of retrieval are no log odds.
        told = [m for m in shown if m in values]
        if name.startswith("retrieval"):
            told = [m for m in told if m not in ("log_loss", "calibration_error")]
        rows.append([name, *(f"{values[m]:.4f}" if m in told else "" for m in shown)])
    return _aligned(rows)


def slices_table(slices: Mapping[str, Mapping[str, Mapping[str, float]]], metric: str) -> str:
    """Queries and one metric by slice and bucket."""
    rows = [["slice", "", "queries", metric]]
    for name, buckets in slices.items():
        for bucket, values in buckets.items():
            rows.append([name, bucket, f"{values['queries']:.0f}", f"{values[metric]:.4f}"])
    return _aligned(rows)


def trials_table(report: TuningReport) -> str:
    """Trials by falling value; that of a pruned one is the best it had reached."""
    rows = [["settings", "trial", f"validation {report.monitor}", "epochs", "state"]]
    for trial in report.trials:
        settings = " ".join(trial.overrides) or "config as it is"
        value = "" if trial.value is None else f"{trial.value:.4f}"
        rows.append([settings, str(trial.number), value, str(trial.epochs), trial.state])
    return _aligned(rows)


def drift_table(report: DriftReport) -> str:
    """Distributions with what was found and allowed, `!` where it exceeds, and what moved most."""
    found = {(f.of, f.measure): f for f in report.findings}
    rows = [["drift of", "psi", "jensen_shannon", "unknown_rise", "values", "moved most"]]
    for one in report.distributions:
        measures = [
            _against(found.get((one.name, m))) for m in ("psi", "jensen_shannon", "unknown_rise")
        ]
        values = f"{one.reference_values} -> {one.today_values}"
        rows.append([one.name, *measures, values, str(one.moved[0]) if one.moved else ""])
    before, now = report.coverage
    drop = _against(next(f for f in report.findings if f.measure == "coverage_drop"))
    return "\n".join([
        f"{report.users} users scored by {report.name}/{report.model_version}, compared with "
        f"{report.reference_users} of {report.reference}",
        _aligned(rows),
        f"coverage@{report.k} of {report.sample_users} users: {before:.4f} -> {now:.4f}, "
        f"drop {drop}",
    ])  # fmt: skip


def tuning_lines(report: TuningReport, run_dir: Path) -> str:
    """The best trial, and the command that makes a run of its settings."""
    told = f"best: trial {report.best_trial}, {report.monitor} {report.best_value:.4f}"
    if not report.best_overrides:
        return f"{told}: nothing was better than the config as it is"
    default = next(trial.value or 0.0 for trial in report.trials if trial.number == 0)
    lift = f", {report.best_value / default - 1:+.1%} over the config as it is" if default else ""
    config, new = run_dir / "config.json", run_dir.with_name(f"{run_dir.name}-tuned")
    command = ["recsys", "run", "--config", str(config), "--run-dir", str(new)]
    for override in report.best_overrides:
        command += ["--set", override]
    return f"{told}{lift}\n{shlex.join(command)}"


def _against(finding: Finding | None) -> str:
    """What was found, and what is allowed."""
    if finding is None:
        return ""
    limit = "" if finding.allowed is None else f"/{finding.allowed:.2f}"
    return f"{'! ' if finding.exceeds else ''}{finding.found:.4f}{limit}"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.low:.4f}-{estimate.high:.4f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
