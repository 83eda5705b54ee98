from types import SimpleNamespace

import pytest

from recsys.artifacts import Estimate
from training.plots import beside_baselines, curves


def test_curves_show_each_metric_and_the_best_epoch():
    model = SimpleNamespace(curves={"loss": [2.0, 1.0], "ndcg@20": [0.1, 0.2]}, best_epoch=2)
    loss, ndcg = curves(model).axes
    assert (loss.get_ylabel(), ndcg.get_ylabel()) == ("loss", "ndcg@20")
    line, best = ndcg.lines
    assert line.get_ydata().tolist() == [0.1, 0.2]
    assert best.get_xdata() == [2, 2]


def test_bars_are_the_values_with_their_intervals():
    report = SimpleNamespace(
        model={"ndcg@20": Estimate(value=0.4, low=0.3, high=0.6)},
        baselines={"markov": {"ndcg@20": Estimate(value=0.2, low=0.1, high=0.25)}},
    )
    (axes,) = beside_baselines(report, "ndcg@20").axes
    assert [bar.get_width() for bar in axes.patches] == [0.4, 0.2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["model", "markov"]
    (intervals,) = axes.collections
    ends = [segment[:, 0].tolist() for segment in intervals.get_segments()]
    assert ends == [pytest.approx([0.3, 0.6]), pytest.approx([0.1, 0.25])]
