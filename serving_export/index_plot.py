"""The picture of an index's tuning: recall against time and bytes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from recsys.artifacts import IndexPoint, IndexReport

_COLOURS = {"brute_force": "#6e7781", "hashed": "#bf8700", "tree": "#1f6feb"}


def draw(report: IndexReport, target: float, file: Path) -> None:
    """Write a PNG: every setting that was tried, the target, and the one that was chosen."""
    figure = Figure(figsize=(8, 3.4))
    figure.suptitle(f"recall@{report.k} of the index on {report.num_queries} held-out queries")
    for place, (name, unit) in enumerate((("ms a query", 1.0), ("MiB", 2.0**20)), start=1):
        axis = figure.add_subplot(1, 2, place)
        for kind, colour in _COLOURS.items():
            points = [point for point in report.curve if point.kind == kind]
            if points:
                axis.scatter(
                    [_value(point, unit) for point in points],
                    [point.recall for point in points],
                    s=12, color=colour, label=kind,
                )  # fmt: skip
        axis.scatter(
            [_value(report, unit)], [report.recall], s=90, facecolors="none", edgecolors="#cf222e",
            label="chosen",
        )  # fmt: skip
        axis.axhline(target, color="#9aa5b1", linewidth=1, linestyle="--")
        axis.set(xscale="log", xlabel=name, ylabel="recall")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def _value(point: IndexPoint, unit: float) -> float:
    return point.milliseconds_per_query if unit == 1 else point.bytes / unit
