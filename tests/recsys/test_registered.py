import json
import shutil

import pytest
from mlflow import MlflowClient

from recsys.artifacts import ArtifactError, ExportedModel, RegisteredModel
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
    with pytest.raises(ArtifactError, match="no 'planted@nobody'"):
        run.registered.publish(models, "nobody", keep=1)
