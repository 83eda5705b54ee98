"""With parameter servers too: what may happen to chief, worker, server, disk and tracking server."""

import os
import re
import signal
import subprocess

import pytest
from disturbed import (
    PATIENCE,
    begin_fit,
    damage_newest,
    end_fit,
    fill,
    wait_for,
    worker,
)
from mlflow import MlflowClient

from recsys.artifacts import TrainedModel
from recsys.config import Cluster

#: Several processes that each start TensorFlow more than once, beside other tests.
pytestmark = pytest.mark.timeout(1500)

EPOCHS = 4
CHIEF, WORKER, SERVER = 0, 1, 2


@pytest.fixture
def disk(tmp_path):
    """The folder of the model, as a disk of 8 MB."""
    disk = tmp_path / "runs" / "planted" / "model"
    disk.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def fit(config, prepared, mlflow_server, disk, tmp_path):
    """`recsys fit` with one worker and one server; gives its process."""
    history = config.model.history.model_copy(update={"kind": "mean"})
    model = config.model.model_copy(update={"dropout": 0.0, "history": history})
    changes = {"epochs": EPOCHS, "patience": EPOCHS, "checkpoint_steps": 3}
    train = config.train.model_copy(update=changes)
    cluster = Cluster(
        kind="spark_parameter_server",
        master="local[3]",
        workers=1,
        servers=1,
        restart_seconds=1,
        heartbeat_timeout_seconds=10,
        spark={"spark.driver.memory": "1g"},
        tracking_uri=mlflow_server.uri,
    )
    changed = config.model_copy(update={"model": model, "train": train, "cluster": cluster})
    process, _ = begin_fit(changed, prepared, tmp_path)
    yield process
    end_fit(process)


@pytest.mark.spark
def test_all_that_may_happen_in_one_training(fit, mlflow_server, disk, tmp_path):
    """Chief killed and its last checkpoint with it; worker and server frozen; then a full disk."""

    def reached(checkpoint):
        wait_for((disk / f"checkpoints/{checkpoint}/state.json").is_file, fit, tmp_path)

    def restarted(number):
        wait_for(lambda: f"restart {number} in 1 s" in log.read_text(), fit, tmp_path)

    log = tmp_path / "fit.log"
    reached("epoch-0001-step-00000006")
    os.kill(worker(disk, CHIEF), signal.SIGKILL)
    damaged = damage_newest(disk / "checkpoints")
    mlflow_server.stop()
    reached("epoch-0002")
    os.kill(worker(disk, WORKER), signal.SIGSTOP)
    os.kill(worker(disk, SERVER), signal.SIGSTOP)
    restarted(2)
    mlflow_server.start()
    reached("epoch-0003")
    ballast = fill(disk)
    restarted(3)
    ballast.unlink()
    code, told = fit.wait(PATIENCE), log.read_text()
    assert code == 0, told
    assert re.search("restart 1 in 1 s: worker 0 on .*: killed by SIGKILL", told)
    second = (disk / "launch/attempt-0002/rank-0.log").read_text()
    assert f"{damaged} cannot be read, the one before is used" in second
    # So is the chief, while it waits for an answer of theirs.
    silent = r"worker {} on \S+: no sign of life for \d+ s"
    assert re.search(f"restart 2 in 1 s: .*{silent.format(WORKER)}.*{silent.format(SERVER)}", told)
    assert "metrics are kept until MLflow can be used again" in second
    assert re.search("restart 3 in 1 s: .*No space left on device", told)
    assert "restart 4" not in told
    trained = TrainedModel.load(disk)
    client = MlflowClient(mlflow_server.uri)
    history = client.get_metric_history(trained.mlflow_run_id, "ndcg_at_20")
    assert [metric.step for metric in history] == list(range(1, EPOCHS + 1))
    assert client.get_run(trained.mlflow_run_id).info.status == "FINISHED"
