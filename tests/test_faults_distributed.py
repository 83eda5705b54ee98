"""A worker, the chief or an executor dies or freezes in the middle: the fit ends as if it had not."""

import math
import os
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import tensorflow as tf
from disturbed import (
    PATIENCE,
    begin_fit,
    damage_newest,
    end_fit,
    executor,
    fill,
    wait_for,
    worker,
)
from mlflow import MlflowClient

from recsys.artifacts import TrainedModel
from recsys.config import Cluster
from training.attempt import Attempt
from training.fit import fit

#: Several processes that each start TensorFlow more than once, beside other tests.
pytestmark = pytest.mark.timeout(1500)

EPOCHS = 4
LOCAL = "local[2]"
#: Each executor is a JVM of its own.
EXECUTORS = "local-cluster[2,1,1024]"
#: Told by Spark, or by the worker that has seen its peer go.
EXECUTOR_LOST = r"restart 1 in 1 s: .*(barrier|ExecutorLost|Unavailable|Aborted|Cancelled)"


@pytest.fixture(scope="module")
def short(config):
    """A training whose steps are the same on one and on two workers, and soon traced."""
    history = config.model.history.model_copy(update={"kind": "mean"})
    model = config.model.model_copy(update={"dropout": 0.0, "history": history})
    changes = {
        "epochs": EPOCHS,
        "patience": EPOCHS,
        "optimizer": "adagrad",
        "learning_rate": 0.1,
        "checkpoint_steps": 3,
    }
    train = config.train.model_copy(update=changes)
    return config.model_copy(update={"model": model, "train": train})


@pytest.fixture(scope="module")
def undisturbed(short, prepared, tmp_path_factory):
    """The same training in one process, which nothing happens to."""
    return fit(short, prepared, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def start(short, prepared, tmp_path):
    """Start `recsys fit` on two workers; gives the process and the folder of the model."""
    started = []

    def begin(master, kind="spark", tracking_uri=None):
        cluster = Cluster(
            kind=kind,
            master=master,
            workers=2,
            servers=2,
            restart_seconds=1,
            heartbeat_timeout_seconds=15,
            spark={"spark.driver.memory": "1g"},
            tracking_uri=tracking_uri,
        )
        config = short.model_copy(update={"cluster": cluster})
        process, model = begin_fit(config, prepared, tmp_path)
        started.append(process)
        return process, model

    yield begin
    for process in started:
        end_fit(process)


def finish(process, model, tmp_path, undisturbed, restarts=1, tracking_uri=None):
    """Wait for the end, compare with an undisturbed training; return the log of the last chief."""
    code = process.wait(PATIENCE)
    told = (tmp_path / "fit.log").read_text()
    assert code == 0, told
    trained = TrainedModel.load(model)
    for name, curve in undisturbed.curves.items():
        np.testing.assert_allclose(trained.curves[name], curve, rtol=5e-3, err_msg=name)
    assert trained.best_epoch == undisturbed.best_epoch
    client = MlflowClient(tracking_uri or f"sqlite:///{model.parents[1] / 'mlflow.db'}")
    steps = [m.step for m in client.get_metric_history(trained.mlflow_run_id, "ndcg_at_20")]
    assert steps == list(range(1, EPOCHS + 1))
    run = client.get_run(trained.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["recsys.spark_application"].startswith(("local-", "app-"))
    assert run.data.metrics["system/cpu_utilization_percentage"] > 0
    attempts = sorted((model / "launch").iterdir())
    assert len(attempts) == 1 + restarts, told
    # Each attempt brought a newer checkpoint, so no wait is longer than the first.
    assert all(f"restart {number} in 1 s" in told for number in range(1, restarts + 1))
    return (attempts[-1] / "rank-0.log").read_text(), told


@pytest.mark.spark
def test_chief_and_worker_killed_and_frozen_in_turn(start, tmp_path, undisturbed):
    """In each of the first three epochs one is lost; the fit ends as if none had been.

    The first takes the newest checkpoint with it, which costs the steps since the one before.
    """
    process, model = start(LOCAL)
    for reached, rank, death in (
        ("epoch-0001-step-00000006", 0, signal.SIGKILL),
        ("epoch-0002", 1, signal.SIGKILL),
        ("epoch-0003", 1, signal.SIGSTOP),
    ):
        wait_for((model / f"checkpoints/{reached}/state.json").is_file, process, tmp_path)
        os.kill(worker(model, rank), death)
        if reached == "epoch-0001-step-00000006":
            damaged = damage_newest(model / "checkpoints")
    log, told = finish(process, model, tmp_path, undisturbed, restarts=3)
    assert re.search("worker 0 on .*: killed by SIGKILL", told)
    attempts = sorted((model / "launch").iterdir())
    assert [Attempt(path).is_abandoned() for path in attempts] == [True] * 3 + [False]
    assert re.search("worker 1 on .*: killed by SIGKILL", told)
    assert re.search(r"worker 1 on .*: no sign of life for \d+ s", told)
    second = (model / "launch/attempt-0002/rank-0.log").read_text()
    assert f"{damaged} cannot be read, the one before is used" in second
    assert "resume after epoch 1, step " in second
    assert "resume after epoch 3, step " in log


@pytest.mark.spark
def test_an_executor_is_killed_while_the_tracking_server_is_down(
    start, mlflow_server, tmp_path, undisturbed
):
    """The server is back after half a minute, once epochs have ended without it."""
    process, model = start(EXECUTORS, tracking_uri=mlflow_server.uri)
    checkpoints = model / "checkpoints"
    wait_for((checkpoints / "epoch-0001/state.json").is_file, process, tmp_path)
    mlflow_server.stop()
    stopped = time.monotonic()
    wait_for((checkpoints / "epoch-0002/state.json").is_file, process, tmp_path)
    os.kill(executor(model, 1), signal.SIGKILL)
    wait_for((checkpoints / "epoch-0003/state.json").is_file, process, tmp_path)
    wait_for(lambda: time.monotonic() > stopped + 30, process, tmp_path)
    mlflow_server.start()
    log, told = finish(process, model, tmp_path, undisturbed, tracking_uri=mlflow_server.uri)
    assert re.search(EXECUTOR_LOST, told)
    assert "resume after epoch 2, step " in log
    assert "metrics are kept until MLflow can be used again" in log


@pytest.mark.spark
def test_a_full_disk_is_waited_for(start, tmp_path, undisturbed):
    disk = tmp_path / "runs" / "planted" / "model"
    disk.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        process, model = start(LOCAL)
        wait_for((disk / "checkpoints/epoch-0001/state.json").is_file, process, tmp_path)
        ballast = fill(disk)
        told = tmp_path / "fit.log"
        wait_for(lambda: "restart 1 in 1 s" in told.read_text(), process, tmp_path)
        ballast.unlink()
        _, told = finish(process, model, tmp_path, undisturbed)
        assert re.search("restart 1 in 1 s: .*No space left on device", told)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.spark
def test_with_servers_a_dead_worker_ends_nothing_but_a_dead_executor_or_server_the_attempt(
    start, tmp_path, undisturbed, prepared, short
):
    process, model = start("local-cluster[5,1,1024]", "spark_parameter_server")
    checkpoints, attempt = model / "checkpoints", model / "launch" / "attempt-0001"
    wait_for((checkpoints / "epoch-0001/state.json").is_file, process, tmp_path)
    os.kill(worker(model, 1), signal.SIGKILL)
    # Each batch was dealt out once, and chief and servers have written their parts.
    weights = str(checkpoints / "epoch-0001" / "weights")
    steps = math.ceil(prepared.train.num_sequences / short.train.global_batch_size)
    assert tf.train.load_variable(weights, "model/step/.ATTRIBUTES/VARIABLE_VALUE") == steps
    assert len(list((checkpoints / "epoch-0001").glob("weights.data-*-of-00003"))) == 3
    wait_for((checkpoints / "epoch-0002/state.json").is_file, process, tmp_path)
    assert "worker 1: killed by SIGKILL; it starts again" in (attempt / "rank-1.log").read_text()
    os.kill(executor(model, 3), signal.SIGKILL)
    wait_for((checkpoints / "epoch-0003/state.json").is_file, process, tmp_path)
    os.kill(worker(model, 4), signal.SIGKILL)
    code = process.wait(PATIENCE)
    told = (tmp_path / "fit.log").read_text()
    assert code == 0, told
    assert re.search(EXECUTOR_LOST, told)
    assert re.search(r"restart 2 in 1 s: worker 4 on .*: killed by SIGKILL", told)
    assert "restart 3" not in told
    assert re.search(r"divided: .*user_id/embeddings in 2", (attempt / "rank-0.log").read_text())
    logs = [(model / f"launch/attempt-{n:04d}/rank-0.log").read_text() for n in (2, 3)]
    assert "resume after epoch 2, step " in logs[0]
    assert "resume after epoch 3, step " in logs[1]
    # Steps are not taken in order, so nothing is equal, but all is learned.
    trained = TrainedModel.load(model)
    assert len(trained.curves["loss"]) == EPOCHS
    assert max(trained.curves["ndcg@20"]) > 0.9 * max(undisturbed.curves["ndcg@20"])
    # What is served lies in one piece again: that of the best checkpoint.
    towers = tf.saved_model.load(str(model / trained.towers))
    users = prepared.vocabularies["user_id"]
    shape = [1 + users.oov + users.size, short.model.embedding_dim]
    variables = towers.signatures["embed_query"].variables
    table = next(variable for variable in variables if variable.shape == shape)
    weights = str(checkpoints / f"epoch-{trained.best_epoch:04d}" / "weights")
    saved = [name for name, found in tf.train.list_variables(weights) if found == shape]
    model_s = next(name for name in saved if not name.startswith("optimizer"))
    np.testing.assert_array_equal(table, tf.train.load_variable(weights, model_s))
