"""Notebooks run as Databricks would run them: top to bottom, with its globals."""

import re
import runpy
from pathlib import Path

import matplotlib as mpl
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))
QUICK = "train.epochs=1 evaluation.bootstrap_samples=20 cluster.master=local[2]"


class Widgets:
    def __init__(self, values):
        self.values = values

    def text(self, name, default):
        self.values.setdefault(name, default)

    def get(self, name):
        return self.values[name]


class Dbutils:
    def __init__(self, **values):
        self.widgets = Widgets(values)


@pytest.mark.spark
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(notebook, tmp_path, clicks_config, capsys):
    mpl.use("Agg")
    shown = []
    widgets = Dbutils(
        run_dir=str(tmp_path / "runs" / "notebook"), config=str(clicks_config), overrides=QUICK
    )
    runpy.run_path(str(notebook), {"dbutils": widgets, "display": shown.append})
    assert len(shown) >= 4
    assert "ndcg@20" in capsys.readouterr().out


def test_notebooks_hold_no_logic():
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        text = notebook.read_text()
        assert text.startswith("# Databricks notebook source\n")
        assert not re.search(r"^\s*(def|class) |sys\.path|%run", text, re.MULTILINE)
