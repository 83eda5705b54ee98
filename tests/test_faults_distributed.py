"""A worker, the chief or an executor dies or freezes in the middle: the fit ends as if it had not."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from mlflow import MlflowClient

from recsys.artifacts import TrainedModel
from recsys.config import Cluster
from training.attempt import Attempt
from training.fit import fit

RECSYS = Path(sys.executable).with_name("recsys")
PATIENCE = 400
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

    def begin(master, kind="spark"):
        folder = tmp_path / "runs" / "planted"
        shutil.copytree(prepared.directory, folder / "data")
        cluster = Cluster(
            kind=kind,
            master=master,
            workers=2,
            servers=2,
            restart_seconds=1,
            heartbeat_timeout_seconds=15,
            spark={"spark.driver.memory": "1g"},
        )
        config = short.model_copy(update={"cluster": cluster})
        (folder / "config.json").write_text(config.model_dump_json())
        with (tmp_path / "fit.log").open("w") as log:
            process = subprocess.Popen(
                [RECSYS, "fit", "--run-dir", folder],
                env=os.environ | {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(process)
        return process, folder / "model"

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(reached, process, tmp_path):
    deadline = time.monotonic() + PATIENCE
    while not reached():
        told = (tmp_path / "fit.log").read_text()
        assert process.poll() is None, f"it was over too early:\n{told}"
        assert time.monotonic() < deadline, f"it took too long:\n{told}"
        time.sleep(0.01)


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    except OSError:
        return []


def worker(model, rank):
    """Process id of a training worker of this model, in its last attempt."""
    attempt = str(sorted((model / "launch").iterdir())[-1])
    for path in Path("/proc").glob("[0-9]*"):
        words = command_line(path.name)
        if "training.worker" in words and words[-3:-1] == [attempt, str(rank)]:
            return int(path.name)
    raise AssertionError(f"no worker {rank} of {attempt}")


def executor(model, rank):
    """Process id of the executor JVM that a worker belongs to."""
    pid = worker(model, rank)
    while not any("CoarseGrainedExecutorBackend" in word for word in command_line(pid)):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        assert pid > 1
    return pid


def finish(process, model, tmp_path, undisturbed, restarts=1):
    """Wait for the end, compare with an undisturbed training; return the log of the last chief."""
    code = process.wait(PATIENCE)
    told = (tmp_path / "fit.log").read_text()
    assert code == 0, told
    trained = TrainedModel.load(model)
    for name, curve in undisturbed.curves.items():
        np.testing.assert_allclose(trained.curves[name], curve, rtol=5e-3, err_msg=name)
    assert trained.best_epoch == undisturbed.best_epoch
    client = MlflowClient(f"sqlite:///{model.parents[1] / 'mlflow.db'}")
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


def damage_newest(checkpoints):
    """Overwrite the weights of the newest checkpoint; gives its name."""
    newest = sorted(checkpoints.glob("*/state.json"))[-1].parent
    for file in newest.glob("weights.data*"):
        file.write_bytes(b"\0" * file.stat().st_size)
    return newest.name


@pytest.mark.spark
def test_an_executor_is_killed(start, tmp_path, undisturbed):
    process, model = start(EXECUTORS)
    wait_for((model / "checkpoints/epoch-0002/state.json").is_file, process, tmp_path)
    os.kill(executor(model, 1), signal.SIGKILL)
    log, told = finish(process, model, tmp_path, undisturbed)
    assert re.search(EXECUTOR_LOST, told)
    assert "resume after epoch 2, step " in log


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
        ballast = disk / "ballast"
        with pytest.raises(OSError, match="No space left"), ballast.open("wb", 0) as stream:
            while True:
                stream.write(b"x" * 4096)
        told = tmp_path / "fit.log"
        wait_for(lambda: "restart 1 in 1 s" in told.read_text(), process, tmp_path)
        ballast.unlink()
        _, told = finish(process, model, tmp_path, undisturbed)
        assert re.search("restart 1 in 1 s: .*No space left on device", told)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.spark
def test_with_servers_a_dead_worker_ends_nothing_and_a_dead_server_the_attempt(
    start, tmp_path, undisturbed, prepared, short
):
    process, model = start("local[5]", "spark_parameter_server")
    checkpoints, attempt = model / "checkpoints", model / "launch" / "attempt-0001"
    wait_for((checkpoints / "epoch-0001/state.json").is_file, process, tmp_path)
    os.kill(worker(model, 1), signal.SIGKILL)
    # Each batch was dealt out once, and chief and servers have written their parts.
    weights = str(checkpoints / "epoch-0001" / "weights")
    steps = math.ceil(prepared.train.num_sequences / short.train.global_batch_size)
    assert tf.train.load_variable(weights, "model/step/.ATTRIBUTES/VARIABLE_VALUE") == steps
    assert len(list((checkpoints / "epoch-0001").glob("weights.data-*-of-00003"))) == 3
    wait_for((checkpoints / "epoch-0003/state.json").is_file, process, tmp_path)
    assert "worker 1: killed by SIGKILL; it starts again" in (attempt / "rank-1.log").read_text()
    os.kill(worker(model, 4), signal.SIGKILL)
    code = process.wait(PATIENCE)
    told = (tmp_path / "fit.log").read_text()
    assert code == 0, told
    assert re.findall(r"restart 1 in 1 s: worker 4 on .*: killed by SIGKILL", told)
    assert "restart 2" not in told
    assert re.search(r"divided: .*user_id/embeddings in 2", (attempt / "rank-0.log").read_text())
    log = (model / "launch" / "attempt-0002" / "rank-0.log").read_text()
    assert "resume after epoch 3, step " in log
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
