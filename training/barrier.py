"""Workers as the tasks of one Spark barrier job: addresses, environment, signs of life.

Own tasks instead of spark-tensorflow-distributor's: that one gives up the port it has found before
TensorFlow takes it, forwards no environment, and runs TensorFlow in a process that Spark reuses.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pyspark import BarrierTaskContext

from recsys.config import Cluster
from training.attempt import DONE, STARTING, Attempt, Failure
from training.session import job_group, watched

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

#: What workers need of the driver's environment: where to track, and how to get at storage.
_FORWARDED = ("MLFLOW_", "DATABRICKS_", "AWS_", "AZURE_", "GOOGLE_", "TF_", "NCCL_")
#: A chief whose tracking server is away shall train on, and not try for minutes as MLflow would.
_BRIEF = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
#: Spark may take a while to start the tasks, and so may the import of TensorFlow.
_START_SECONDS = 300.0
_POLL_SECONDS = 0.5
#: Several signs of life that did not come, and less than TensorFlow takes to notice (10 s).
_SILENT_SECONDS = 5.0
#: How long TensorFlow may take to shut down after the work is done.
_EXIT_SECONDS = 60.0


def run_workers(
    spark: SparkSession, call: bytes, attempt: Attempt, jobs: Sequence[str], cluster: Cluster
) -> None:
    """Run the pickled `(function, args)` in as many tasks as jobs; return when all are done.

    With parameter servers a worker that has died is started again in its task, and the others go
    on meanwhile. Spark ends all tasks with one, so this does not hold for a lost executor.

    Args:
        spark: classic session, with a slot for each job.
        call: see `training.worker`.
        attempt: its folder is shared with all executors.
        jobs: of the barrier tasks, by rank.
        cluster: section of the config; says when a worker counts as frozen, and when as stuck.

    Raises:
        WorkerError: the function raised in a worker.
        WorkersLost: a task died, froze, hung, met an outage, or its executor was lost.
    """
    context = spark.sparkContext
    forwarded = {k: v for k, v in os.environ.items() if k.startswith(_FORWARDED)}
    task = partial(_task, call, attempt.folder, jobs, cluster, forwarded)
    with job_group(spark, f"{len(jobs)} training tasks") as cancel:
        watch = _Watch(attempt, len(jobs), cluster.heartbeat_timeout_seconds, cancel)
        try:
            with watched(watch.run):
                rows = context.parallelize(range(len(jobs)), len(jobs))
                rows.barrier().mapPartitions(task).collect()
        except Exception as error:
            attempt.abandon()
            # TensorFlow may notice a frozen worker first; then all that is known is that others
            # failed. Where one raised, the others are silent because Spark has ended them.
            if not any(failure.kind == "error" for failure in attempt.failures()):
                watch.note_silent(_SILENT_SECONDS)
            # Spark knows of exit codes and lost executors only, and wraps them in pages of trace.
            lines = str(error).strip().splitlines()
            told = " ".join(line for line in lines if not line.startswith("\tat "))
            raise attempt.diagnosis(told[:2000]) from error
        except BaseException:
            # Whoever interrupts the driver does not want workers that go on.
            attempt.abandon()
            cancel()
            raise


class _Watch:
    """Cancels the job when a worker gives no sign of life."""

    def __init__(
        self, attempt: Attempt, workers: int, timeout: float, cancel: Callable[[], None]
    ) -> None:
        self._attempt = attempt
        self._timeout = timeout
        self._cancel = cancel
        self._start_seconds = max(_START_SECONDS - timeout, 0)
        start = time.monotonic() + self._start_seconds
        self._last = dict.fromkeys(range(workers), ("", start))

    def run(self, over: threading.Event) -> None:
        """Look until the job is over, or has been cancelled."""
        while not over.wait(_POLL_SECONDS):
            if max(map(self._silence, self._last)) > self._timeout:
                # Frozen processes cannot end themselves: Spark kills the tasks, Linux with them
                # the workers. First of all, as notes need a disk.
                self._cancel()
                with suppress(OSError):
                    self.note_silent(self._timeout)
                return

    def note_silent(self, seconds: float) -> None:
        """Note the workers that gave no sign of life for so long as lost."""
        for rank in self._last:
            silence = self._silence(rank)
            if silence > seconds:
                told = f"no sign of life for {silence:.0f} s (cluster.heartbeat_timeout_seconds)"
                self._attempt.fail(_lost(self._attempt, rank, told))

    def _silence(self, rank: int) -> float:
        """Seconds since the last sign of life; none after the work is done."""
        (sign, since), now = self._last[rank], time.monotonic()
        # Shared storage that cannot be read has no new sign, and may have one the next time.
        with suppress(OSError):
            sign = self._attempt.sign(rank)
        if sign != self._last[rank][0]:
            since = now + (self._start_seconds if sign == STARTING else 0)
            self._last[rank] = (sign, since)
        return 0.0 if sign == DONE else now - since


def _task(
    call: bytes,
    folder: Path,
    jobs: Sequence[str],
    cluster: Cluster,
    forwarded: Mapping[str, str],
    _rows: Iterable[int],
) -> Iterator[None]:
    """Be the Spark task of one rank: start it with its place in the cluster, wait for it."""
    context = BarrierTaskContext.get()
    attempt, rank = Attempt(folder), context.partitionId()
    host = context.getTaskInfos()[rank].address.split(":")[0]
    attempt.note_host(rank, host)
    with _reserved_port() as port:
        place = {"TF_CONFIG": _place(jobs, context.allGather(f"{host}:{port}"), rank)}
        environment = {**_BRIEF, **os.environ, **forwarded, **_own(context), **place}
        command = ["training.worker", str(folder), str(rank), str(cluster.progress_timeout_seconds)]
        more = cluster.max_restarts if "ps" in jobs and jobs[rank] == "worker" else 0
        while True:
            code = _run(command, call, attempt, rank, environment)
            # How the process ends after its work is TensorFlow's affair.
            if not code or attempt.sign(rank) == DONE:
                return iter(())
            told = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            if not more or attempt.is_abandoned():
                attempt.fail(_lost(attempt, rank, told))
                raise RuntimeError(f"worker {rank} on {host}: {told}; log {attempt.log(rank)}")
            attempt.note_restart(rank, told)
            more -= 1


def _place(jobs: Sequence[str], addresses: Sequence[str], rank: int) -> str:
    """Return the `TF_CONFIG` of a rank."""
    cluster: dict[str, list[str]] = {}
    for job, address in zip(jobs, addresses, strict=True):
        cluster.setdefault(job, []).append(address)
    index = rank - jobs.index(jobs[rank])
    return json.dumps({"cluster": cluster, "task": {"type": jobs[rank], "index": index}})


def _run(
    module: Sequence[str], call: bytes, attempt: Attempt, rank: int, environment: Mapping[str, str]
) -> int:
    command = [sys.executable, "-P", "-m", *module]
    with attempt.log(rank).open("ab") as log, tempfile.TemporaryFile() as handed:
        handed.write(call)
        handed.seek(0)
        process = subprocess.Popen(command, stdin=handed, stdout=log, stderr=log, env=environment)
        return _ended(process, attempt, rank)


def _ended(process: subprocess.Popen[bytes], attempt: Attempt, rank: int) -> int:
    """Wait for a worker while it works, and not much longer once its work is done."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL_SECONDS)
        with suppress(OSError):
            if attempt.sign(rank) == DONE:
                break
    with suppress(subprocess.TimeoutExpired):
        return process.wait(_EXIT_SECONDS)
    process.kill()
    return process.wait()


def _lost(attempt: Attempt, rank: int, message: str) -> Failure:
    host, log = attempt.host(rank), attempt.log(rank)
    return Failure(kind="lost", rank=rank, host=host, log=log, message=message)


def _own(context: BarrierTaskContext) -> dict[str, str]:
    """Environment that lets a worker have the port, the GPUs and the packages of its task."""
    gpus = context.resources().get("gpu")
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(gpus.addresses) if gpus else "",
        # The reserved socket has this option too: so both may have the port, and nobody else.
        "TF_GRPC_REUSE_PORT": "true",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


@contextmanager
def _reserved_port() -> Iterator[int]:
    """Hold a free port; it never listens, so TensorFlow gets all connections."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("", 0))
        yield held.getsockname()[1]
