"""The main job as a user runs it: one command, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from recsys.artifacts import (
    EvaluationReport,
    ExportedModel,
    PreparedData,
    Promotion,
    RegisteredModel,
    Scoring,
    TrainedModel,
)

RECSYS = Path(sys.executable).with_name("recsys")


def test_every_step_left_its_manifest(finished_run):
    prepared = PreparedData.load(finished_run / "data")
    assert prepared.train.num_examples > 3000
    model = TrainedModel.load(finished_run / "model")
    # Without a `ranking` section there is no second stage.
    assert model.before_refit is None
    assert not (finished_run / "ranking").exists()
    assert EvaluationReport.load(finished_run / "evaluation").impressions == {}
    assert model.mlflow_run_id == RegisteredModel.load(finished_run / "registration").run_id
    promotion = Promotion.load(finished_run / "promotion")
    assert promotion.promoted
    assert any("popularity" in reason for reason in promotion.reasons)
    exported = ExportedModel.load(finished_run / "export")
    assert exported.index.recall >= 0.95
    assert exported.parity["exact"] == 1.0
    scoring = Scoring.load(finished_run / "scoring")
    assert scoring.num_users == prepared.num_users == 450


def test_the_model_beats_popularity_and_finds_the_planted_transitions(finished_run):
    report = EvaluationReport.load(finished_run / "evaluation")
    assert set(report.baselines) == {"popularity", "last_viewed", "markov", "covisitation", "als"}
    assert report.model["recall@1"].value > 0.6
    assert report.baselines["markov"]["recall@1"].value > 0.7
    assert report.lifts["popularity"]["ndcg@20"].low > 0.5


def test_scores_carry_the_version_in_every_row(finished_run):
    scoring = Scoring.load(finished_run / "scoring")
    rows = pd.read_parquet(scoring.directory / scoring.destination)
    assert set(rows["model_version"]) == {scoring.model_version}
    assert (rows["items"].str.len() == 5).all()
    assert rows["user"].is_unique


def test_mlflow_holds_parameters_metrics_and_the_champion(finished_run):
    registered = RegisteredModel.load(finished_run / "registration")
    client = MlflowClient(f"sqlite:///{finished_run.parent / 'mlflow.db'}")
    run = client.get_run(registered.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == "6"
    report = EvaluationReport.load(finished_run / "evaluation")
    assert run.data.metrics["test/ndcg_at_20"] == pytest.approx(report.model["ndcg@20"].value)
    curve = client.get_metric_history(registered.run_id, "ndcg_at_20")
    model = TrainedModel.load(finished_run / "model")
    assert [point.value for point in curve] == pytest.approx(model.curves["ndcg@20"])
    logged = {file.path for file in client.list_artifacts(registered.run_id, "export")}
    assert logged == {"export/manifest.json", "export/index.txt", "export/index.png"}
    champion = client.get_model_version_by_alias("planted", "champion")
    assert str(champion.version) == registered.model_version


def test_the_summary_is_for_a_person(finished_run, command):
    shown = command("summary", "--run-dir", finished_run).stdout
    for word in ("popularity", "markov", "als", "ndcg@20", "promoted to champion", "item "):
        assert word in shown
    assert shown.count("user u") == 3


def test_one_user_is_answered_by_the_champion(finished_run, command):
    arguments = ["recommend", "--run-dir", finished_run, "--user"]
    answer = subprocess.run(
        [RECSYS, *arguments, "u7", "--k", "4"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.strip().splitlines()
    assert lines[0].startswith("user u7: item ")
    assert len(lines) == 5
    unknown = command(*arguments, "nobody")
    assert unknown.returncode == 1
    assert "has no user 'nobody'" in unknown.stderr


def test_the_registered_model_filters_by_columns_of_the_query(finished_run):
    mlflow.set_tracking_uri(f"sqlite:///{finished_run.parent / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model("models:/planted@champion")
    assert {"filter_cluster", "filter_price"} < set(model.metadata.get_input_schema().input_names())
    histories = [["i1", "i7"], ["i1", "i7"], [], ["i3"]]
    frame = pd.DataFrame(
        {
            "history": histories,
            "filter_cluster": [["c1", "c2"], [], ["c1"], ["no such"]],
            "filter_price": [[np.nan, np.nan], [12.0, 13.0], [np.nan, 14.0], [np.nan, np.nan]],
        }
    )
    clicks = pd.read_csv(finished_run.parent.parent / "planted" / "clicks.csv")
    items = clicks.drop_duplicates("item").set_index("item")
    first, second, third, none = model.predict(frame, params={"k": 6})["ids"]
    assert len(first) == 6
    assert set(items.loc[first, "cluster"]) <= {"c1", "c2"}
    assert items.loc[second, "price"].between(12, 13).all()
    assert set(items.loc[third, "cluster"]) == {"c1"}
    assert (items.loc[third, "price"] <= 14).all()
    assert none == []
    plain = model.predict(frame[["history"]], params={"k": 60})["ids"]
    # Without the columns nothing is filtered; with them the same items are left, in their order.
    assert first == [i for i in plain[0] if items.loc[i, "cluster"] in ("c1", "c2")][:6]


def test_a_finished_run_is_not_repeated(finished_run, clicks_config, command, caplog):
    before = json.loads((finished_run / "data" / "manifest.json").read_text())
    again = command("run", "--config", clicks_config, "--run-dir", finished_run)
    assert again.returncode == 0, again.stderr
    assert caplog.text.count("finished before") == 7
    assert json.loads((finished_run / "data" / "manifest.json").read_text()) == before


def test_the_registered_model_needs_nothing_of_ours(finished_run, tmp_path):
    """A fresh process, isolated from this package and its environment, in another folder."""
    code = (
        "import sys, mlflow, pandas as pd\n"
        f"mlflow.set_tracking_uri('sqlite:///{finished_run.parent / 'mlflow.db'}')\n"
        "model = mlflow.pyfunc.load_model('models:/planted@champion')\n"
        "query = pd.DataFrame({'history': [['i1', 'i7']], 'user_id': ['u1'], 'clicked': [0]})\n"
        "print(len(model.predict(query, params={'k': 3})['ids'][0]))\n"
        "assert not {'recsys', 'training', 'serving_export'} & set(sys.modules)\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "TF_CPP_MIN_LOG_LEVEL": "3"}
    answer = subprocess.run(
        [sys.executable, "-I", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip().splitlines()[-1] == "3"
