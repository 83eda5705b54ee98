import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.attempt import Attempt, WorkerError
from training.barrier import _reserved_port
from training.distribute import launch

#: A parent that starts a worker as a Spark task does, tells its process id, and waits.
TASK = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-P", "-m", "training.worker", sys.argv[1], "0"], stdin=0)
print(worker.pid, flush=True)
sys.exit(worker.wait())
"""


@pytest.fixture
def task(tmp_path):
    """A worker, the only one, that sleeps; gives the attempt, the task and the worker's id."""
    attempt = Attempt.next_in(tmp_path)
    with _reserved_port() as port:
        place = {
            "cluster": {"worker": [f"localhost:{port}"]},
            "task": {"type": "worker", "index": 0},
        }
        environment = os.environ | {"TF_CONFIG": json.dumps(place), "TF_GRPC_REUSE_PORT": "true"}
        process = subprocess.Popen(
            [sys.executable, "-c", TASK, str(attempt.folder)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        process.stdin.write(pickle.dumps((time.sleep, [300])))
        process.stdin.close()
        worker = int(process.stdout.readline())
        while not attempt.sign(0):
            time.sleep(0.05)
        yield attempt, process, worker
        process.kill()
        process.wait()


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_the_end(pid, seconds=30):
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_it_ends_once_the_driver_has_given_it_up(task):
    attempt, process, _ = task
    signs = {attempt.sign(0)}
    deadline = time.monotonic() + 60
    while len(signs) < 3 and time.monotonic() < deadline:
        signs.add(attempt.sign(0))
        time.sleep(0.1)
    assert len(signs) == 3
    attempt.abandon()
    assert process.wait(60) == 1


def test_it_dies_with_its_task_also_while_frozen(task):
    _, process, worker = task
    os.kill(worker, signal.SIGSTOP)
    process.kill()
    assert wait_for_the_end(worker)


@pytest.mark.spark
def test_an_error_of_the_function_comes_back_from_its_worker_and_is_not_retried(
    two_workers, launched, spark, tmp_path
):
    with pytest.raises(WorkerError) as caught:
        launch(
            launched.stumble, two_workers, tmp_path, "raise", folder=tmp_path, spark=lambda: spark
        )
    told = str(caught.value)
    assert "worker 1 on" in told
    assert "KeyError: 'no such column'" in told
    assert "launched.py" in told  # the traceback
    assert "attempt-0001/rank-1.log:" in told
    assert len(list((tmp_path / "launch").iterdir())) == 1
