"""The picture of a drift report: each measure against its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recsys.drift_report import DriftReport, Finding
from recsys.monitoring_config import Measure

_WITHIN, _ABOVE, _UNASKED = "#1f6feb", "#cf222e", "#6e7781"
_TITLES: dict[Measure, str] = {
    "psi": "PSI",
    "jensen_shannon": "Jensen-Shannon distance",
    "unknown_rise": "rise of unknown values",
    "coverage_drop": "drop of coverage",
}


def draw(report: DriftReport, file: Path) -> None:
    """Write a PNG: a panel for each measure, a bar for each distribution, limits as lines.

    Bars above their limit are red, those without a limit grey.
    """
    panels = {m: [f for f in report.findings if f.measure == m] for m in _TITLES}
    panels = {measure: findings for measure, findings in panels.items() if findings}
    heights = [1 + len(findings) for findings in panels.values()]
    figure = Figure(figsize=(8, 0.8 + 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (measure, findings) in zip(axes, panels.items(), strict=True):
        _panel(axis, findings)
        axis.set_title(_TITLES[measure], loc="left", fontsize=9)
    figure.suptitle(
        f"drift of {report.users} users scored by {report.name}/{report.model_version}", fontsize=10
    )
    figure.savefig(file, dpi=150)


def _panel(axis: Any, findings: list[Finding]) -> None:
    places = range(len(findings))
    axis.barh(places, [f.found for f in findings], color=[_colour(f) for f in findings])
    for place, finding in enumerate(findings):
        if finding.allowed is not None:
            axis.vlines(finding.allowed, place - 0.45, place + 0.45, color="black", linewidth=1)
    axis.set_yticks(places, [f.of for f in findings])
    axis.tick_params(labelsize=8)
    axis.invert_yaxis()


def _colour(finding: Finding) -> str:
    if finding.allowed is None:
        return _UNASKED
    return _ABOVE if finding.exceeds else _WITHIN
