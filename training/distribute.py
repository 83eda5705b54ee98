"""Run a training function where the config says: in this process, on its GPUs, on Spark."""

from __future__ import annotations

import importlib
import itertools
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tensorflow as tf

from recsys.artifacts import Manifest
from recsys.config import Cluster
from training.attempt import Attempt, WorkersLost
from training.supervise import supervise

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Manifest)


def launch(
    fn: Callable[..., M],
    cluster: Cluster,
    *args: Any,
    folder: Path,
    spark: Callable[[], SparkSession],
    saved: Callable[[], str] = str,
) -> M:
    """Call `fn(*args)` with the strategy of `cluster.kind` in scope, on every worker that it has.

    | kind | where | strategy |
    |---|---|---|
    | local | this process | none |
    | mirrored | this process, all its GPUs | `MirroredStrategy` |
    | spark | `cluster.workers` barrier tasks | `MultiWorkerMirroredStrategy` |
    | spark_parameter_server | the same, `cluster.servers`, a chief | `ParameterServerStrategy` |

    On Spark a launch that loses workers is restarted (see `supervise`), and `fn` is expected to go
    on from what it has saved. With parameter servers the chief alone calls `fn`, and a worker that
    dies ends nothing.

    Args:
        fn: function of a module that all executors have; returns the manifest of what it has left
            on shared storage.
        cluster: section of the config.
        args: such as config and manifests; pickled for Spark.
        folder: receives logs and signs of life of Spark's workers, in `launch/`; shared by driver
            and executors.
        spark: gives the session, if it is needed.
        saved: names what `fn` has saved so far, ever greater; restarts count anew when it grows.

    Returns:
        What the chief returned.

    Raises:
        ValueError: workers cannot import `fn`.
        ClusterError: the cluster cannot run it, found before it starts.
        WorkerError: `fn` raised in a worker.
        WorkersLost: workers were lost, or met outages, more often than `cluster.max_restarts`.
    """
    match cluster.kind:
        case "local":
            return fn(*args)
        case "mirrored":
            with tf.distribute.MirroredStrategy().scope():
                return fn(*args)
        case "spark" | "spark_parameter_server":
            call = _pickled(fn, args)
            session = spark()
            restarts = itertools.count()
            return supervise(
                lambda: _attempt(session, call, cluster, folder, next(restarts)), cluster, saved
            )


def _attempt(
    spark: SparkSession, call: bytes, cluster: Cluster, folder: Path, restarts: int
) -> Any:
    from training.barrier import run_workers
    from training.preflight import ClusterError, check_cluster

    try:
        workers = check_cluster(spark, cluster, folder)
        attempt = Attempt.next_in(folder.resolve() / "launch")
    except (ClusterError, OSError) as error:
        if not restarts:
            raise
        # It was in order before: what was lost may be on its way back.
        raise WorkersLost(str(error)) from error
    logger.info("%d workers start; the log of the chief is %s", workers, attempt.log(0))
    try:
        run_workers(spark, call, attempt, cluster.jobs(workers), cluster)
        return attempt.result()
    except OSError as error:
        raise WorkersLost(f"{attempt.folder} is out of reach: {error}") from error


def _pickled(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Pickle by name, as workers import the function anew."""
    module = importlib.import_module(fn.__module__)
    if fn.__module__ == "__main__" or getattr(module, fn.__qualname__, None) is not fn:
        raise ValueError(
            f"{fn.__module__}.{fn.__qualname__} cannot be launched on Spark: expected a function "
            "at the top of a module of an installed package, which workers can import"
        )
    return pickle.dumps((fn, args))
