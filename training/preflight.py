"""Find in seconds why a cluster could not train, before its workers wait for each other."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from recsys.config import Cluster
from training.attempt import WorkersLost
from training.session import job_group, watched

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

#: Imports nothing heavy, so it is a matter of seconds; starting executors is not in it.
_PROBE_SECONDS = 120.0
#: A lost executor is replaced in that time, if it is at all.
_SLOT_SECONDS = 60.0
_POLL_SECONDS = 1.0


class ClusterError(RuntimeError):
    """The cluster cannot run the training; the message says what to change."""


def check_cluster(spark: SparkSession, cluster: Cluster, folder: Path) -> int:
    """Check session, slots, executors and shared folder.

    Args:
        spark: session of the driver.
        cluster: section of the config.
        folder: must be one that all executors see and can write to.

    Returns:
        Workers that the cluster has slots for: `cluster.workers`, or fewer if it has shrunk and
        `cluster.min_workers` allows that.

    Raises:
        ClusterError: it cannot run the training.
        WorkersLost: an executor was lost while it looked.
    """
    if type(spark).__module__.startswith("pyspark.sql.connect"):
        raise ClusterError(
            f"cluster.kind={cluster.kind} needs a classic Spark session, this one is Spark "
            "Connect, which has no barrier tasks: use a dedicated (single user) cluster, or "
            "cluster.kind=local"
        )
    if spark.sparkContext.getConf().get("spark.dynamicAllocation.enabled", "false") == "true":
        raise ClusterError(
            f"cluster.kind={cluster.kind} needs all tasks at once, which Spark refuses under "
            "dynamic allocation: set spark.dynamicAllocation.enabled=false"
        )
    gpus = _gpus_per_task(spark)
    if gpus and gpus % 1:
        raise ClusterError(
            f"spark.task.resource.gpu.amount={gpus:g} makes workers share a GPU, which NCCL "
            "refuses and which gains nothing: set it to 1 or more"
        )
    if cluster.kind == "spark_parameter_server" and gpus and gpus > 1:
        raise ClusterError(
            f"spark.task.resource.gpu.amount={gpus:g}: with parameter servers each GPU of a worker "
            "would learn the same batches; set it to 1 and raise cluster.workers"
        )
    workers = _workers_with_slots(spark, cluster)
    _check_executors(spark, len(cluster.jobs(workers)), folder)
    return workers


def _workers_with_slots(spark: SparkSession, cluster: Cluster) -> int:
    """Wait a little for slots: executors may just be starting."""
    fewest = cluster.min_workers or cluster.workers
    others = len(cluster.jobs(0))
    deadline = time.monotonic() + _SLOT_SECONDS
    while (slots := _slots(spark)) - others < cluster.workers and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    if slots - others < fewest:
        beside = f", {others} more of chief and servers" if others else ""
        raise ClusterError(
            f"cluster.workers={cluster.workers} need as many free task slots{beside}, the cluster "
            f"has {slots}: add executors or cores, or lower cluster.workers (or min_workers)"
        )
    workers = min(slots - others, cluster.workers)
    if workers < cluster.workers:
        logger.warning("%d of %d workers: the cluster has no more slots", workers, cluster.workers)
    return workers


def _slots(spark: SparkSession) -> int:
    """Tasks that can run at a time, by the count that the scheduler starts barrier stages by."""
    scheduler = spark.sparkContext._jsc.sc()
    profile = scheduler.resourceProfileManager().defaultResourceProfile()
    return int(scheduler.maxNumConcurrentTasks(profile))


def _check_executors(spark: SparkSession, workers: int, folder: Path) -> None:
    """Compare what tasks on the executors find with what the driver has."""
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".preflight.{uuid4().hex}"
    token.touch()
    look = _looking(str(token))
    try:
        own = next(look([]))
        reports = _probed(spark, look, workers)
    finally:
        token.unlink()
    for report in sorted(reports, key=lambda report: report["host"]):
        _check_report(report, own, folder)
    if _gpus_per_task(spark) is None:
        _warn_of_idle_gpus(reports)


def _probed(
    spark: SparkSession, look: Callable[[Iterable[int]], Iterator[dict[str, str]]], workers: int
) -> list[dict[str, str]]:
    """Reports of so many tasks, or a clear word when they take too long."""
    with job_group(spark, "check of the cluster") as cancel:
        patience = _Patience(lambda: _slots(spark) < workers, cancel)
        try:
            with watched(patience.run):
                tasks = spark.sparkContext.parallelize(range(workers), workers).barrier()
                return tasks.mapPartitions(look).collect()
        except Exception as error:
            raise patience.reason or _explained(error) from error


class _Patience:
    """Cancels a job that cannot start any more, or takes too long.

    Spark starts no task of a barrier job before all have a slot: one whose host was cut off after
    the job was submitted would be waited for without end.
    """

    def __init__(self, shrunk: Callable[[], bool], cancel: Callable[[], None]) -> None:
        self.reason: ClusterError | WorkersLost | None = None
        self._shrunk = shrunk
        self._cancel = cancel

    def run(self, over: threading.Event) -> None:
        """Look until the job is over, or has been cancelled."""
        deadline = time.monotonic() + _PROBE_SECONDS
        while not over.wait(_POLL_SECONDS):
            if self._shrunk():
                self.reason = WorkersLost("an executor was lost before the workers started")
            elif time.monotonic() > deadline:
                self.reason = ClusterError(
                    f"executors have not answered within {_PROBE_SECONDS:.0f} s: a mount of theirs "
                    "may hang, or their Python may not start; Spark's log of the executors tells"
                )
            if self.reason:
                self._cancel()
                return


def _gpus_per_task(spark: SparkSession) -> float | None:
    amount = spark.sparkContext.getConf().get("spark.task.resource.gpu.amount")
    return float(amount) if amount else None


def _warn_of_idle_gpus(reports: Iterable[Mapping[str, str]]) -> None:
    idle = {report["host"]: report["gpus"] for report in reports if report["gpus"] != "0"}
    if idle:
        told = ", ".join(f"{gpus} on {host}" for host, gpus in sorted(idle.items()))
        logger.warning(
            "training uses CPUs, although there are GPUs (%s): Spark gives workers none until "
            "spark.task.resource.gpu.amount and spark.executor.resource.gpu.amount are set",
            told,
        )


def _explained(error: Exception) -> ClusterError | WorkersLost:
    """Tell executors that cannot run Python tasks from executors that were lost meanwhile."""
    told = str(error).strip()
    if "PythonException" not in told:
        return WorkersLost(f"an executor was lost before the workers started: {told[:2000]}")
    lines = [line for line in told.splitlines() if "Error" in line or "MISMATCH" in line]
    return ClusterError(f"executors cannot run this driver's Python tasks: {' '.join(lines[:3])}")


def _check_report(report: Mapping[str, str], own: Mapping[str, str], folder: Path) -> None:
    host = report["host"]
    if report["shared"]:
        raise ClusterError(
            f"{folder} must be shared by driver and executors, but on {host}: {report['shared']}; "
            "give --run-dir a folder that all of them mount"
        )
    for name in own.keys() - {"host", "shared", "gpus"}:
        if report.get(name) != own[name]:
            raise ClusterError(
                f"{name} is {own[name]} on the driver, but {report.get(name) or 'missing'} on "
                f"{host}: install the same on all executors (PYSPARK_PYTHON names their Python)"
            )


def _looking(token: str) -> Callable[[Iterable[int]], Iterator[dict[str, str]]]:
    """Make the task that looks around: versions, and whether `token` of the driver is there."""

    def look(_rows: Iterable[int]) -> Iterator[dict[str, str]]:
        # Pickled by value with all it uses, as this package may be missing where it runs.
        import hashlib
        import importlib.util
        import os
        import platform
        import socket
        from importlib.metadata import PackageNotFoundError, version
        from pathlib import Path

        report = {"host": socket.gethostname(), "python": platform.python_version(), "shared": ""}
        report["gpus"] = str(len(list(Path("/dev").glob("nvidia[0-9]*"))))
        for package in ("tensorflow", "tf-keras", "tensorflow-recommenders"):
            try:
                report[package] = version(package)
            except PackageNotFoundError:
                report[package] = ""
        sources = hashlib.sha256()
        for package in ("recsys", "training"):
            found = importlib.util.find_spec(package)
            for folder in (found.submodule_search_locations or []) if found else []:
                for file in sorted(Path(folder).rglob("*.py")):
                    sources.update(file.read_bytes())
        report["build of clickstream-recommender"] = sources.hexdigest()[:12]
        mine = Path(f"{token}.{socket.gethostname()}.{os.getpid()}")
        try:
            Path(token).stat()
            mine.touch()
            mine.unlink()
        except OSError as error:
            report["shared"] = str(error)
        yield report

    return look
