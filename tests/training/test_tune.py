"""One real study by the command, killed in the middle of a trial; one undisturbed beside it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from recsys.artifacts import PreparedData, TrainedModel
from recsys.config import ConfigError, load_config
from recsys.overrides import with_values
from recsys.run_folder import RunFolder
from recsys.tuning_report import TuningReport
from training.tracking import Tracker
from training.tune import tune

RECSYS = Path(sys.executable).with_name("recsys")
RATES = {"choices": [0.02, 0.00001]}
SPACE = {"train.learning_rate": RATES, "model.hidden": {"choices": [[16], [8]]}}
TRIALS = 3
PATIENCE = 400


def tuned_config(config, space, **changes):
    """Of few epochs and soon traced; one finished trial is enough to prune the others."""
    values = {"train.epochs": 2, "tune.startup_trials": 1, "tune.space": space}
    values["model.history.kind"] = "mean"
    return with_values(config, values | changes)


@pytest.fixture(scope="module")
def data(prepared, tmp_path_factory):
    """Prepared data without a test split: whoever reads it fails."""
    folder = tmp_path_factory.mktemp("untested") / "data"
    shutil.copytree(prepared.directory, folder)
    shutil.rmtree(folder / prepared.test.path)
    return PreparedData.load(folder)


@pytest.fixture
def tracker(config, tmp_path):
    return Tracker.open(config, tmp_path / "runs" / "one", "token")


def start(folder, log):
    command = [RECSYS, "tune", "--run-dir", str(folder), "--trials", str(TRIALS)]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


@pytest.fixture(scope="module")
def killed(config, data, tmp_path_factory):
    """Run folder and last output of a study that was killed after the first epoch of trial 1."""
    runs = tmp_path_factory.mktemp("runs")
    folder = RunFolder(runs / "planted")
    folder.freeze(tuned_config(config, SPACE))
    shutil.copytree(data.directory, folder.path / "data")
    state = folder.path / "tuning" / "trial-0001" / "checkpoints" / "epoch-0001" / "state.json"
    with (runs / "first.log").open("w") as log:
        process = start(folder.path, log)
    deadline = time.monotonic() + PATIENCE
    while not state.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    ended = process.poll()
    if ended is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert state.is_file(), f"ended with {ended}:\n{(runs / 'first.log').read_text()}"
    assert ended is None, "the study was over before it could be killed"
    assert not TuningReport.exists(folder.path / "tuning")
    with (runs / "second.log").open("w") as log:
        code = start(folder.path, log).wait(PATIENCE)
    told = (runs / "second.log").read_text()
    assert code == 0, told
    return folder.path, told


@pytest.fixture(scope="module")
def report(killed):
    return TuningReport.load(killed[0] / "tuning")


def test_a_killed_study_ends_like_an_undisturbed_one(
    killed, report, config, data, tmp_path, tracker
):
    assert "trial 1 was killed: it is tried again" in killed[1]
    assert "resume after epoch 1" in killed[1]
    undisturbed = tune(tuned_config(config, SPACE), data, tmp_path / "tuning", tracker, TRIALS)
    for one, other in zip(report.trials, undisturbed.trials, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-6)
        assert one.model_dump(exclude={"value"}) == other.model_dump(exclude={"value"})
    assert report.best_overrides == undisturbed.best_overrides


def test_the_config_as_it_is_takes_part_and_bad_settings_are_pruned(report, config):
    by_number = {trial.number: trial for trial in report.trials}
    assert sorted(by_number) == list(range(TRIALS))
    assert by_number[0].overrides == []
    assert by_number[0].state == "complete"
    slow = [t for t in report.trials if "train.learning_rate=1e-05" in t.overrides]
    assert slow
    assert {trial.state for trial in slow} == {"pruned"}
    assert all(trial.epochs == 2 for trial in slow)
    assert report.best_value == max(t.value for t in report.trials) >= by_number[0].value
    assert report.monitor == config.train.monitor


def test_only_the_best_model_stays(killed, report):
    folder = killed[0] / "tuning"
    assert [p.name for p in folder.glob("trial-*")] == [report.best_model]
    model = TrainedModel.load(folder / report.best_model)
    assert model.curves[report.monitor][model.best_epoch - 1] == report.best_value
    assert (folder / report.best_model / model.towers / "saved_model.pb").is_file()


def test_the_run_keeps_its_config_and_the_command_is_told(killed, report, config):
    folder, told = killed
    frozen = RunFolder(folder).config()
    assert frozen == tuned_config(config, SPACE)
    assert "validation ndcg@20" in told
    if report.best_overrides:
        assert (
            f"recsys run --config {folder / 'config.json'} --run-dir {folder}-tuned --set" in told
        )
    again = load_config(folder / "config.json", report.best_overrides)
    assert again.model_dump(exclude={"model", "train"}) == frozen.model_dump(
        exclude={"model", "train"}
    )


def test_every_trial_is_a_nested_mlflow_run(killed, report):
    client = MlflowClient(f"sqlite:///{killed[0].parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("clickstream-recommender").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    parent = runs.pop("planted")
    assert parent.info.status == "FINISHED"
    assert sorted(runs) == [f"trial-{number:04d}" for number in range(TRIALS)]
    for trial in report.trials:
        run = runs[f"trial-{trial.number:04d}"]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == {"complete": "FINISHED", "pruned": "KILLED"}[trial.state]
        assert len(run.data.params) == len(trial.overrides)
        points = client.get_metric_history(run.info.run_id, "ndcg_at_20")
        assert [point.step for point in points] == list(range(1, trial.epochs + 1))
    best = runs[report.best_model]
    assert best.data.metrics["best/ndcg_at_20"] == pytest.approx(report.best_value)
    assert (
        TrainedModel.load(killed[0] / "tuning" / report.best_model).mlflow_run_id
        == best.info.run_id
    )


def test_a_trial_that_fails_leaves_the_others_alone(config, data, tmp_path, tracker):
    """A layer larger than any memory: the config takes it, the training cannot."""
    changed = tuned_config(config, {"model.hidden": {"choices": [[10**13]]}}, **{"train.epochs": 1})
    report = tune(changed, data, tmp_path / "tuning", tracker, 2)
    assert [trial.state for trial in report.trials] == ["complete", "failed"]
    assert report.best_overrides == []
    assert [p.name for p in (tmp_path / "tuning").glob("trial-*")] == ["trial-0000"]
    statuses = {
        r.info.run_name: r.info.status for r in MlflowClient(tracker.uri).search_runs(["1"])
    }
    assert statuses["trial-0001"] == "FAILED"
    # All are done: nothing is trained, and what was known is told again.
    assert tune(changed, data, tmp_path / "tuning", tracker, 2).trials == report.trials


def test_without_a_space_or_with_a_wrong_key_nothing_is_begun(config, data, tmp_path, tracker):
    with pytest.raises(ConfigError, match=r"tune\.space is empty"):
        tune(config, data, tmp_path / "tuning", tracker)
    wrong = tuned_config(config, {"model.dropuot": {"low": 0.1, "high": 0.5}})
    with pytest.raises(ConfigError, match=r"model\.dropuot: unknown key; did you mean 'dropout'\?"):
        tune(wrong, data, tmp_path / "tuning", tracker)
    assert not (tmp_path / "tuning").exists()
