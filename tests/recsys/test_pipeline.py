import shutil

import pytest
from mlflow import MlflowClient

from recsys.artifacts import ArtifactError, EvaluationReport, PreparedData, RegisteredModel
from recsys.config import ConfigError, RunConfig
from recsys.pipeline import TUNING, Run
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


def test_preparing_again_takes_away_what_was_tuned_on_it(config, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.freeze(config)
    folder.step(TUNING).mkdir()
    Run(folder, config)._invalidate("fit")
    assert folder.step(TUNING).is_dir()
    Run(folder, config)._invalidate("prepare")
    assert not folder.step(TUNING).exists()


def test_a_failure_marks_the_mlflow_run_and_the_next_attempt_continues_it(run):
    shutil.rmtree(run.directory("fit") / "towers")
    client, run_id = MlflowClient(run.tracker.uri), run.tracker.run_id
    with pytest.raises(ArtifactError, match="cannot be loaded as a SavedModel"):
        run.do("export", again=True)
    assert client.get_run(run_id).info.status == "FAILED"
    assert Run(run.folder, run.config).tracker.run_id == run_id
    assert client.get_run(run_id).info.status == "RUNNING"


def test_asking_leaves_a_finished_run_finished(run, finished_run):
    shutil.copy(finished_run.parent / "mlflow.db", run.folder.path.parent)
    run_id = run.load("register", RegisteredModel).run_id
    assert "user u7" in run.recommend("u7", 3, "champion")
    client = MlflowClient(f"sqlite:///{run.folder.path.parent / 'mlflow.db'}")
    assert client.get_run(run_id).info.status == "FINISHED"


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
