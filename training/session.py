"""One Spark session for a laptop or a cluster, and a clear word when Java is missing."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from recsys.config import Cluster

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

_FIX = "sudo apt-get install openjdk-17-jre-headless"
_LOCAL = {
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.memory": "4g",
    "spark.sql.shuffle.partitions": "8",
}
_EVERYWHERE = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
}


class JavaError(RuntimeError):
    """There is no Java that Spark 4 runs on; the message has the command that fixes it."""


def check_java() -> None:
    """Check for Java 17, or 21 and later, where Spark looks for it: JAVA_HOME, then PATH.

    Raises:
        JavaError: none is found, or another version.
    """
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    where = f" (JAVA_HOME={home})" if home else ""
    if java is None or not Path(java).is_file():
        raise JavaError(f"Spark 4 needs Java 17 or 21, found none{where}: {_remedy(home)}")
    version = _java_version(java)
    if version is None or (version != 17 and version < 21):
        found = "an unknown version" if version is None else f"Java {version}"
        raise JavaError(f"Spark 4 needs Java 17 or 21, found {found} at {java}: {_remedy(home)}")


def _remedy(home: str | None) -> str:
    return f"unset JAVA_HOME, or {_FIX}" if home else _FIX


def _java_version(java: str) -> int | None:
    """Return the major version: 8 of `1.8.0_392`, 17 of `17.0.15`."""
    try:
        told = subprocess.run(
            [java, "-version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "(?:1\.)?(\d+)', told.stderr + told.stdout)
    return int(match.group(1)) if match else None


def has_session() -> bool:
    """Whether this process has a Spark session already, as a notebook of a cluster has."""
    from pyspark.sql import SparkSession

    return SparkSession.getActiveSession() is not None


def spark_session(cluster: Cluster, app_name: str) -> SparkSession:
    """Return the session of the cluster, started if need be, with the `tfrecord` source.

    A local master is started quietly: what its JVM writes to stderr (start-up notices of Java and
    log4j, which no setting turns off, and later warnings) goes to a file that is logged here.

    Args:
        cluster: its `master` is empty inside a Spark cluster, whose session is then used.
        app_name: shown by Spark.

    Raises:
        JavaError: a local master finds no Java that Spark 4 runs on.
    """
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    from training.tfrecord import register

    is_local = cluster.master is not None and cluster.master.startswith("local")
    settings = {**_EVERYWHERE, **(_LOCAL if is_local else {}), **cluster.spark}
    # A JVM that runs is used again, and is quiet since it was started here.
    if is_local and getattr(SparkContext, "_gateway", None) is None:
        _start_local(settings, str(cluster.master), app_name)
    builder = SparkSession.builder.appName(app_name)
    if cluster.master is not None:
        builder = builder.master(cluster.master)
    for key, value in settings.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    # A session that was there before keeps its time zone unless it is set again.
    spark.conf.set("spark.sql.session.timeZone", settings["spark.sql.session.timeZone"])
    register(spark)
    return spark


@contextmanager
def job_group(spark: SparkSession, description: str) -> Iterator[Callable[[], None]]:
    """Give the jobs of this block a group of their own, and a function that cancels them."""
    context, key = spark.sparkContext, "spark.jobGroup.id"
    group, callers = f"recsys-{uuid4().hex}", context.getLocalProperty(key)
    context.setJobGroup(group, description, interruptOnCancel=True)
    try:
        yield lambda: context.cancelJobGroup(group)
    finally:
        context.setLocalProperty(key, callers)


@contextmanager
def watched(look: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `look` in a thread beside the block; the event that it gets is set when that ends."""
    over = threading.Event()
    thread = threading.Thread(target=look, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _start_local(settings: dict[str, str], master: str, app_name: str) -> None:
    """Start the JVM with its stderr in a file; the session then finds this context."""
    from pyspark import SparkConf, SparkContext
    from pyspark.java_gateway import launch_gateway

    check_java()
    # Workers run the interpreter of the driver, or they would not find this package.
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    conf = SparkConf().setMaster(master).setAppName(app_name).setAll(list(settings.items()))
    with tempfile.NamedTemporaryFile(
        "wb", prefix="recsys-spark-", suffix=".log", delete=False
    ) as log:
        try:
            gateway = launch_gateway(conf, popen_kwargs={"stderr": log, "stdout": log})
        except Exception as error:
            told = Path(log.name).read_text("utf-8", "replace").strip()[-2000:]
            raise RuntimeError(f"Spark's JVM did not start: {told}") from error
    logger.info("Spark %s starts; what its JVM says is in %s", master, log.name)
    SparkContext(conf=conf, gateway=gateway)
