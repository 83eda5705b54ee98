import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from tensorflow import errors

from recsys.artifacts import ArtifactError
from training.attempt import Attempt, WorkerError, WorkersLost
from training.barrier import _reserved_port
from training.distribute import launch
from training.worker import _told, failure_kind

#: A parent that starts a worker as a Spark task does, tells its process id, and waits.
TASK = """
import subprocess, sys
command = [sys.executable, "-P", "-m", "training.worker", sys.argv[1], "0", sys.argv[2]]
worker = subprocess.Popen(command, stdin=0)
print(worker.pid, flush=True)
sys.exit(worker.wait())
"""


@pytest.fixture
def task(tmp_path, request):
    """A worker, the only one, that sleeps; gives the attempt, the task and the worker's id."""
    attempt = Attempt.next_in(tmp_path)
    patience = getattr(request, "param", "1800")
    with _reserved_port() as port:
        place = {
            "cluster": {"worker": [f"localhost:{port}"]},
            "task": {"type": "worker", "index": 0},
        }
        environment = os.environ | {"TF_CONFIG": json.dumps(place), "TF_GRPC_REUSE_PORT": "true"}
        process = subprocess.Popen(
            [sys.executable, "-c", TASK, str(attempt.folder), patience],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=attempt.log(0).open("wb"),
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


@pytest.mark.parametrize("task", ["5"], indirect=True)
def test_it_ends_once_nothing_gets_on_and_says_where_it_hangs(task):
    attempt, process, _ = task
    assert process.wait(60) == 1
    told = attempt.diagnosis("")
    assert isinstance(told, WorkersLost)
    expected = r"no step or validation batch for \d+ s \(cluster\.progress_timeout_seconds\)"
    assert re.search(expected, str(told))
    assert "training/worker.py" in attempt.log(0).read_text()


def caused(error, cause):
    error.__cause__ = cause
    return error


FULL = errors.ResourceExhaustedError(None, None, "w.tmp; No space left on device")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.UnavailableError(None, None, "Connection reset by peer"), "peer"),
        (errors.InternalError(None, None, "cudaErrorIllegalAddress"), "outage"),
        (errors.UnknownError(None, None, "Input/output error"), "outage"),
        (FULL, "outage"),
        (errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"), "error"),
        (OSError(errno.ESTALE, "Stale file handle"), "outage"),
        (OSError(errno.ENOSPC, "No space left on device"), "outage"),
        (requests.ConnectionError("Connection refused"), "outage"),
        (TimeoutError(), "outage"),
        (caused(ArtifactError("a"), OSError(errno.EIO, "Input/output error")), "outage"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "error"),
        (PermissionError(errno.EACCES, "Permission denied"), "error"),
        (requests.exceptions.InvalidURL("no host"), "error"),
        (errors.InvalidArgumentError(None, None, "shapes"), "error"),
        (caused(ArtifactError("corrupt"), errors.DataLossError(None, None, "crc")), "error"),
        (KeyError("x"), "error"),
    ],
    ids=repr,
)
def test_what_another_attempt_may_mend_is_told_from_errors_of_the_code(error, kind):
    assert failure_kind(error) == kind


def test_what_happened_is_told_and_not_where_in_the_code():
    where = """Graph execution error:

Detected at node CollectiveReduceV2 defined at (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main

"""
    why = "Collective ops is aborted by: Deadline Exceeded\n\nRPC: /tensorflow.x/Heartbeat"
    told = _told(errors.DeadlineExceededError(None, None, where + why))
    assert told == "Collective ops is aborted by: Deadline Exceeded"
    assert _told(ValueError("\nno such\ncolumn")) == "no such"
    assert not _told(KeyboardInterrupt())


@pytest.mark.spark
def test_an_error_of_the_function_comes_back_from_its_worker_and_is_not_retried(
    two_workers, launched, spark, tmp_path
):
    with pytest.raises(WorkerError) as caught:
        launch(launched.stumble, two_workers, tmp_path, folder=tmp_path, spark=lambda: spark)
    told = str(caught.value)
    assert "worker 1 on" in told
    assert "KeyError: 'no such column'" in told
    assert "launched.py" in told  # the traceback
    assert "attempt-0001/rank-1.log:" in told
    assert len(list((tmp_path / "launch").iterdir())) == 1
