"""Two stages through the command: what a run makes of a config with a `ranking` section."""

import shutil

import pytest
from mlflow import MlflowClient

from recsys.artifacts import (
    EvaluationReport,
    ExportedModel,
    PreparedData,
    Promotion,
    RegisteredModel,
    TrainedModel,
    TrainedRanker,
)
from recsys.config import load_config
from recsys.pipeline import Run
from recsys.run_folder import RunFolder

SETTINGS = [
    "ranking.candidates=20",
    "ranking.epochs=3",
    "ranking.hidden=[16]",
    "ranking.loss=listwise",
    "train.epochs=3",
    "export.exploration={kind: epsilon_greedy, epsilon: 0.2, slots: 1, pool: 10}",
    "train.refit=true",
    "evaluation.baselines=[popularity]",
    "registry.model=two_stages",
]


@pytest.fixture(scope="module")
def two_stages(prepared, clicks_config, command, spark, tmp_path_factory):
    """Folder of a run of two stages, on data that another run has prepared; read-only."""
    folder = tmp_path_factory.mktemp("two_stages") / "run"
    RunFolder(folder).freeze(load_config(clicks_config, SETTINGS))
    shutil.copytree(prepared.directory, folder / "data")
    changes = [part for setting in SETTINGS for part in ("--set", setting)]
    answer = command("run", "--config", clicks_config, "--run-dir", folder, *changes)
    assert answer.returncode == 0, answer.stderr
    (folder.parent / "shown.txt").write_text(answer.stdout)
    return folder


def opened(folder):
    return Run(RunFolder(folder), RunFolder(folder).config())


def test_the_second_stage_learned_from_towers_that_do_not_know_its_labels(two_stages):
    model = TrainedModel.load(two_stages / "model")
    assert model.before_refit == "towers_before_refit"
    ranker = TrainedRanker.load(two_stages / "ranking")
    prepared = PreparedData.load(two_stages / "data")
    assert sum(ranker.lists.values()) == prepared.validation.num_examples
    assert all(0 < ranker.with_label[part] <= of for part, of in ranker.lists.items())
    assert len(ranker.curves["held_out_loss"]) <= 3
    assert set(ranker.held_out) == {"ranker", "uncalibrated", "retrieval"}
    calibrated, raw = ranker.held_out["ranker"], ranker.held_out["uncalibrated"]
    assert calibrated["log_loss"] <= raw["log_loss"]
    assert calibrated["auc"] == pytest.approx(raw["auc"])
    assert calibrated["auc"] > 0.7


def test_two_stages_are_judged_beside_retrieval_alone(two_stages):
    report = EvaluationReport.load(two_stages / "evaluation")
    assert set(report.lifts) == {"retrieval", "popularity"}
    lift = report.lifts["retrieval"]["ndcg@10"]
    assert lift.low <= lift.value <= lift.high
    # Both rank the same 20 of 60 items.
    assert report.model["recall@20"] == report.baselines["retrieval"]["recall@20"]
    assert report.impressions["model"]["positives"] == report.impressions["retrieval"]["positives"]
    found = report.num_queries * report.model["recall@20"].value
    assert report.impressions["model"]["positives"] == pytest.approx(found)


def test_the_export_answers_as_the_run_was_evaluated(two_stages):
    exported = ExportedModel.load(two_stages / "export")
    assert exported.parity["exact"] == 1.0
    reasons = Promotion.load(two_stages / "promotion").reasons
    assert any("over retrieval" in reason for reason in reasons)


def test_the_evidence_is_in_mlflow_and_in_the_summary(two_stages):
    registered = RegisteredModel.load(two_stages / "registration")
    client = MlflowClient(f"sqlite:///{two_stages.parent / 'mlflow.db'}")
    metrics = client.get_run(registered.run_id).data.metrics
    ranker = TrainedRanker.load(two_stages / "ranking")
    assert metrics["ranker/held_out/auc"] == pytest.approx(ranker.held_out["ranker"]["auc"])
    report = EvaluationReport.load(two_stages / "evaluation")
    assert metrics["impressions/model/auc"] == pytest.approx(report.impressions["model"]["auc"])
    shown = (two_stages.parent / "shown.txt").read_text()
    for word in ("retrieval", "user_auc", "calibration_error", "two_stages/1"):
        assert word in shown


def test_evaluating_again_leaves_the_ranker(two_stages):
    run = opened(two_stages)
    assert run.steps[2] == "rank"
    run.do("rank")
    assert EvaluationReport.exists(two_stages / "evaluation")
