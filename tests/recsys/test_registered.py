import json
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf
from mlflow import MlflowClient
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog
from typer.testing import CliRunner

from recsys.artifacts import ArtifactError, ExportedModel, Promotion, RegisteredModel
from recsys.cli import app
from recsys.pipeline import Run
from recsys.run_folder import RunFolder


@pytest.fixture
def run(finished_run, tmp_path):
    """A finished run that a test may change, with its registry."""
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.copy(finished_run.parent / "mlflow.db", tmp_path)
    folder = RunFolder(tmp_path / "run")
    return Run(folder, folder.config())


def test_asking_leaves_a_finished_run_finished(run):
    run_id = run.load("register", RegisteredModel).run_id
    assert "user u7" in run.registered.recommend("u7", 3, "champion")
    client = MlflowClient(f"sqlite:///{run.folder.path.parent / 'mlflow.db'}")
    assert client.get_run(run_id).info.status == "FINISHED"


def test_publish_hands_the_champion_to_servers(run, tmp_path):
    models = tmp_path / "models"
    told = run.registered.publish(models, "champion", keep=1)
    assert told.splitlines() == [
        "published  models:/planted/1 as version 1",
        f"exact      {models}/exact/1",
        f"scann      {models}/scann/1",
    ]
    registered = run.load("register", RegisteredModel)
    told = json.loads((models / "scann/1/assets.extra/registered.json").read_text())
    assert told["run_id"] == registered.run_id
    assert told["digest"] == run.load("export", ExportedModel).digest
    check_filters(models / "scann/1/assets.extra")
    with pytest.raises(ArtifactError, match="no 'planted@nobody'"):
        run.registered.publish(models, "nobody", keep=1)


def check_filters(extra):
    """The contract tells what to filter by, the example does, and a server is warmed up by it."""
    filters = json.loads((extra / "contract.json").read_text())["filters"]
    assert {name: told["input"] for name, told in filters.items()} == {
        "cluster": "filter_cluster", "price": "filter_price",
    }  # fmt: skip
    assert filters["price"]["ends"] == [10, 16]
    asked = json.loads((extra / "examples/rows.request.json").read_text())["instances"]
    assert asked[0]["filter_cluster"] == [filters["cluster"]["frequent"][0]]
    assert asked[0]["filter_price"] == [10, 16]
    records = tf.data.TFRecordDataset(str(extra / "tf_serving_warmup_requests"))
    logs = [PredictionLog.FromString(r.numpy()).predict_log.request for r in records]
    warm = [log.inputs for log in logs if log.model_spec.signature_name == "recommend"]
    prices = np.concatenate([tf.make_ndarray(inputs["filter_price"]) for inputs in warm])
    assert np.isnan(prices).any()
    assert (prices > 16).any()


def asked(command, *arguments):
    """What a command of `recsys` prints."""
    done = CliRunner().invoke(app, [command, *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout.splitlines()


def test_a_champion_exported_with_other_settings_takes_over_and_goes(run, tmp_path):
    """Every command of the hand-off, on a finished run."""
    folder, models = ["--run-dir", run.folder.path], tmp_path / "models"
    promoted = asked("champion", *folder)
    assert promoted[0].startswith("champion   models:/planted/1 (MLflow run ")
    assert promoted[1] == "gate       promoted"
    lineage = asked("lineage", *folder)
    assert lineage[0] == "model      models:/planted/1"
    assert re.fullmatch(r"code       recsys \S+, git ([0-9a-f]{40}|unknown)", lineage[2])
    assert lineage[-1].startswith("table      ")

    asked("export", *folder, "--set", "export.overfetch=9")
    assert not Promotion.exists(run.directory("promote"))
    asked("register", *folder)
    asked("promote", *folder)
    assert asked("champion", *folder)[0].startswith("champion   models:/planted/2")
    published = asked("publish", *folder, "--to", models)
    assert published[0] == "published  models:/planted/2 as version 1"
    item = asked("recommend", *folder, "--user", "u7", "--k", 1)
    (tmp_path / "out.csv").write_text("item\ni3\n")
    told = asked("availability", "--to", models, "--unavailable", tmp_path / "out.csv")
    assert told[0].startswith(f"version 2 of {models}: 1 of ")
    assert asked("withdraw", "--from", models)[0].endswith("servers return to version 1")
    back = asked("rollback", *folder)
    assert back == ["champion   models:/planted/1 (it was models:/planted/2)"]
    assert asked("recommend", *folder, "--user", "u7", "--k", 1) == item
