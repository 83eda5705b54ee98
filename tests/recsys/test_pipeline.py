import shutil
from pathlib import Path

import pytest
import tensorflow as tf
from mlflow import MlflowClient

from recsys.artifacts import (
    ArtifactError,
    EvaluationReport,
    ExportedModel,
    PreparedData,
    Promotion,
    RegisteredModel,
    Scoring,
)
from recsys.config import ConfigError, RunConfig
from recsys.pipeline import Run
from recsys.run_folder import RunFolder
from recsys.steps import STEPS


@pytest.fixture
def run(finished_run, tmp_path):
    """A finished run that a test may change."""
    shutil.copytree(finished_run, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    return Run(folder, folder.config())


def finished(run):
    return [name for name, (_, kind) in STEPS.items() if kind.exists(run.directory(name))]


def test_a_step_that_the_config_does_not_have_is_refused(run):
    with pytest.raises(ConfigError, match="no `ranking` section"):
        run.do("rank")


def test_a_finished_step_is_left_alone(run):
    before = run.load("prepare", PreparedData)
    run.do("prepare")
    assert run.load("prepare", PreparedData) == before
    assert finished(run) == run.steps


def test_a_step_done_again_takes_away_what_later_steps_made_of_it(run):
    before = run.load("evaluate", EvaluationReport)
    without_als = run.config.model_dump()
    without_als["evaluation"]["baselines"] = ["popularity", "markov"]
    again = Run(run.folder, RunConfig.model_validate(without_als))
    again.do("evaluate", again=True)
    assert finished(again) == ["prepare", "fit", "evaluate"]
    after = again.load("evaluate", EvaluationReport)
    assert after.model == before.model
    assert set(after.baselines) == {"popularity", "markov"}


@pytest.mark.spark
def test_a_run_keeps_the_answers_of_the_run_that_scored_last(run, finished_run, spark, tmp_path):
    shutil.copy(finished_run.parent / "mlflow.db", tmp_path)
    run.do("score", again=True, last=Scoring.load(finished_run / "scoring"))
    scoring = run.load("score", Scoring)
    assert scoring.num_kept == scoring.num_users == 450
    # Its own answers too, though its result is made anew.
    run.do("score", again=True, last=scoring)
    assert run.load("score", Scoring).num_kept == 450


def test_a_failure_marks_the_mlflow_run_and_the_next_attempt_continues_it(run):
    shutil.rmtree(run.directory("fit") / "towers")
    client, run_id = MlflowClient(run.tracker.uri), run.tracker.run_id
    with pytest.raises(ArtifactError, match="cannot be loaded as a SavedModel"):
        run.do("export", again=True)
    assert client.get_run(run_id).info.status == "FAILED"
    assert Run(run.folder, run.config).tracker.run_id == run_id
    assert client.get_run(run_id).info.status == "RUNNING"


def test_a_corpus_that_was_not_prepared_leaves_the_export(run, tmp_path):
    before = run.load("export", ExportedModel)
    with pytest.raises(ArtifactError, match=r"elsewhere/data/manifest.json.*`recsys prepare`"):
        run.reindex(tmp_path / "elsewhere")
    assert run.load("export", ExportedModel) == before
    assert finished(run) == run.steps


def test_a_ranker_is_not_asked_about_items_it_was_not_trained_with(run):
    ranking = RunConfig.model_validate(run.config.model_dump() | {"ranking": {}})
    with pytest.raises(ConfigError, match=r"--corpus-of: a ranker knows .*train anew"):
        Run(run.folder, ranking).reindex(run.folder.path)


def test_the_present_model_is_exported_over_a_later_corpus(run, finished_run, tmp_path):
    """The later run has one item more, which no click has taught."""
    shutil.copy(finished_run.parent / "mlflow.db", tmp_path)
    later = tmp_path / "later"
    shutil.copytree(run.directory("prepare"), later / "data")
    before, data = run.load("export", ExportedModel), PreparedData.load(later / "data")
    shard = Path(data.files(data.corpus)[-1])
    new = tf.train.Example.FromString(next(iter(tf.data.TFRecordDataset(str(shard)))).numpy())
    for name in ("item", "name", "item_id"):
        new.features.feature[name].bytes_list.value[:] = [b"brand new"]
    with tf.io.TFRecordWriter(str(shard.with_name("part-99999.tfrecord"))) as writer:
        writer.write(new.SerializeToString())
    corpus = data.corpus.model_copy(update={"num_items": data.corpus.num_items + 1})
    data.model_copy(update={"corpus": corpus}).save()

    run.reindex(later)

    after = run.load("export", ExportedModel)
    assert after.num_candidates == before.num_candidates + 1
    assert after.corpus == str(later / "data" / data.corpus.path)
    assert after.digest != before.digest
    assert after.parity["exact"] == 1.0
    assert finished(run) == ["prepare", "fit", "evaluate", "export"]

    run.do("register")
    run.do("promote")
    promotion = run.load("promote", Promotion)
    assert (promotion.promoted, promotion.previous_version) == (True, "1")
    assert not (run.directory("promote") / "champion").exists()
    told = "it is the model of champion version 1, exported anew: the index alone counts"
    assert promotion.reasons == [told]
    items = f"items      {after.num_candidates} of {later / 'data'}"
    assert items in run.registered.lineage(None).splitlines()


def test_the_mlflow_run_has_what_came_out(finished_run):
    run_id = RegisteredModel.load(finished_run / "registration").run_id
    client = MlflowClient(f"sqlite:///{finished_run.parent / 'mlflow.db'}")
    tags = client.get_run(run_id).data.tags
    assert {"recsys.version", "recsys.versions.tensorflow", "recsys.schema_fingerprint"} <= set(
        tags
    )
    exported = ExportedModel.load(finished_run / "export")
    logged = {
        file.path
        for folder in ("data", "model", "evaluation", "export", "lineage")
        for file in client.list_artifacts(run_id, folder)
    }
    assert {
        "data/manifest.json",
        "model/manifest.json",
        "model/curves.png",
        "evaluation/manifest.json",
        "evaluation/summary.txt",
        "evaluation/baselines.png",
        "export/manifest.json",
        "export/index.txt",
        "export/index.png",
        f"lineage/{exported.digest}.json",
    } <= logged


def test_the_next_fit_may_begin_with_another_model_unless_one_was_interrupted(run, finished_run):
    run.start_with(str(finished_run))
    assert run.config.train.warm_start == str(finished_run)
    assert run.folder.config() == run.config
    (run.directory("fit") / "manifest.json").unlink()
    with pytest.raises(
        ConfigError, match=r"holds a fit that began with train\.warm_start=.*planted"
    ):
        run.start_with("champion")
    assert run.folder.config() == run.config


def test_the_run_reads_its_own_folders(run):
    assert [run.directory(step).name for step in STEPS] == [
        "data",
        "model",
        "ranking",
        "evaluation",
        "export",
        "registration",
        "promotion",
        "scoring",
    ]
