"""A `recsys fit` on Spark in a process of its own, and its workers to be killed and frozen."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECSYS = Path(sys.executable).with_name("recsys")
PATIENCE = 400


def begin_fit(config, prepared, tmp_path):
    """Start it on a copy of the data; gives the process and the folder of the model."""
    folder = tmp_path / "runs" / "planted"
    shutil.copytree(prepared.directory, folder / "data")
    (folder / "config.json").write_text(config.model_dump_json())
    with (tmp_path / "fit.log").open("w") as log:
        process = subprocess.Popen(
            [RECSYS, "fit", "--run-dir", folder],
            env=os.environ | {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return process, folder / "model"


def end_fit(process):
    """End it, if a test that has failed left it behind."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def wait_for(reached, process, tmp_path):
    """Wait until it is reached, while the process lives."""
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


def damage_newest(checkpoints):
    """Overwrite the weights of the newest checkpoint; gives its name."""
    newest = sorted(checkpoints.glob("*/state.json"))[-1].parent
    for file in newest.glob("weights.data*"):
        file.write_bytes(b"\0" * file.stat().st_size)
    return newest.name


def fill(disk):
    """Take all space that a disk has left; gives the file to remove again."""
    ballast = disk / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", 0) as stream:
        while True:
            stream.write(b"x" * 4096)
    return ballast
