import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from recsys.artifacts import (
    ArtifactError,
    ExportedModel,
    PreparedData,
    RegisteredModel,
    Scoring,
)
from recsys.drift_report import DriftReport
from recsys.monitored import _training_data, monitored
from recsys.pipeline import Run
from recsys.run_folder import RunFolder
from serving_export.lineage import remember
from serving_export.registry import connect

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """A finished run and its registry, in another place; the model was made by the first one."""
    root = tmp_path_factory.mktemp("monitored")
    shutil.copytree(finished_run, root / "run")
    shutil.copy(finished_run.parent / "mlflow.db", root)
    folder = RunFolder(root / "run")
    return Run(folder, folder.config())


def test_the_day_of_the_training_is_quiet_and_on_the_run_in_mlflow(run, spark):
    report = monitored(run, None)
    assert report is not None
    assert report.alarms == []
    assert report.reference == str(_training_data(run.load("score", Scoring), None).directory)
    assert Path(report.reference) != run.directory("prepare")
    client = MlflowClient(f"sqlite:///{run.folder.path.parent / 'mlflow.db'}")
    run_id = run.load("register", RegisteredModel).run_id
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["drift/alarms"] == 0
    assert found.data.metrics["drift/psi/history"] == 0
    assert found.data.metrics["drift/coverage"] > 0.5
    logged = {file.path for file in client.list_artifacts(run_id, "monitoring")}
    assert logged == {f"monitoring/{name}" for name in ("manifest.json", "drift.txt", "drift.png")}


def test_drift_is_exit_code_3_and_leaves_the_scores(run, spark, command, caplog):
    """Everybody has clicked one item, the same; the command says so, as a nightly job calls it."""
    data = run.load("prepare", PreparedData)
    folder = data.directory / data.users
    users = pq.read_table(folder)
    place = users.schema.get_field_index("history")
    history = pa.array([["i1"]] * len(users), users.schema.field("history").type)
    shutil.rmtree(folder)
    folder.mkdir()
    pq.write_table(users.set_column(place, "history", history), folder / "part-00000.parquet")
    before = Scoring.load(run.directory("score"))
    answer = command("monitor", "--run-dir", run.folder.path)
    assert answer.returncode == 3, answer.stderr
    assert "drift: psi of history: found " in caplog.text
    assert answer.stderr == "recsys: drift exceeds 4 limits of `monitoring`\n"
    assert answer.stdout == (run.folder.path / "monitoring" / "drift.txt").read_text()
    report = DriftReport.load(run.folder.path / "monitoring")
    assert [(alarm.of, alarm.measure) for alarm in report.alarms] == [
        (name, measure)
        for name in ("history", "history.length")
        for measure in ("psi", "jensen_shannon")
    ]
    assert Scoring.load(run.directory("score")) == before
    assert (before.directory / before.destination).is_dir()


def test_without_a_champion_nothing_is_monitored(run, tmp_path, caplog):
    registry = run.config.registry.model_copy(update={"model": "other"})
    other = Run(run.folder, run.config.model_copy(update={"registry": registry}))
    (run.directory("score") / "manifest.json").rename(tmp_path / "kept")
    try:
        assert monitored(other, None) is None
        assert "nothing is monitored: no version of the model has passed the gate" in caplog.text
        with pytest.raises(ArtifactError, match=r"run `recsys score` first"):
            monitored(run, None)
    finally:
        (tmp_path / "kept").rename(run.directory("score") / "manifest.json")


def test_data_of_the_training_that_changed_or_are_gone_are_no_reference(
    run, finished_run, tmp_path
):
    client = MlflowClient(f"sqlite:///{run.folder.path.parent / 'mlflow.db'}")
    run_id, scoring = run.load("register", RegisteredModel).run_id, run.load("score", Scoring)
    connect(client.tracking_uri)
    exported, settings = run.load("export", ExportedModel), run.config.export
    learned = PreparedData.load(finished_run / "data")
    try:
        client.set_tag(run_id, "recsys.run_dir", str(tmp_path))
        remember(run_id, exported, learned, settings)
        with pytest.raises(
            ArtifactError, match=r"which are gone: keep the run folder .*--reference"
        ):
            _training_data(scoring, None)
        later = learned.created_at.replace(year=2099)
        (tmp_path / "data").mkdir()
        learned.model_copy(update={"directory": tmp_path / "data", "created_at": later}).save()
        with pytest.raises(ArtifactError, match=r"was prepared again at 2099-"):
            _training_data(scoring, None)
    finally:
        client.set_tag(run_id, "recsys.run_dir", str(finished_run))
        remember(run_id, exported, learned, settings)
    assert _training_data(scoring, finished_run) == learned
