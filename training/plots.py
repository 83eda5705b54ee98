"""Pictures of a run for its MLflow page."""

from __future__ import annotations

from matplotlib.figure import Figure

from recsys.artifacts import EvaluationReport, TrainedModel


def curves(model: TrainedModel) -> Figure:
    """Each metric by epoch, one below the other; the best epoch is marked."""
    figure = Figure(figsize=(6, 1.8 * len(model.curves)), layout="constrained")
    for number, (metric, values) in enumerate(sorted(model.curves.items()), start=1):
        axes = figure.add_subplot(len(model.curves), 1, number)
        axes.plot(range(1, len(values) + 1), values, marker=".")
        axes.axvline(model.best_epoch, color="grey", linewidth=0.8, linestyle="--")
        axes.set_ylabel(metric)
    figure.supxlabel("epoch")
    return figure


def beside_baselines(report: EvaluationReport, metric: str) -> Figure:
    """One metric of the model and of each baseline, with its interval."""
    bars = {"model": report.model[metric]}
    bars |= {name: values[metric] for name, values in report.baselines.items()}
    figure = Figure(figsize=(6, 0.5 + 0.4 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    estimates = list(bars.values())
    axes.barh(
        list(bars),
        [e.value for e in estimates],
        xerr=[[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]],
        color=["tab:blue", *["tab:grey"] * len(report.baselines)],
        capsize=3,
    )
    axes.invert_yaxis()
    axes.set_xlabel(metric)
    return figure
