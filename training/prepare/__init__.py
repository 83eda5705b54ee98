"""From the click table to examples, corpus, vocabularies and users, without a look ahead."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.artifacts import MANIFEST, PreparedData
from recsys.config import RunConfig
from training.prepare.columns import check_columns
from training.prepare.errors import LeakError, PrepareError, explained

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["LeakError", "PrepareError", "check_columns", "prepare"]


def prepare(config: RunConfig, spark: SparkSession, directory: Path) -> PreparedData:
    """Prepare the data of a run; whatever an earlier attempt left in `directory` is replaced.

    Args:
        config: the run's.
        spark: session with the `tfrecord` source registered.
        directory: folder to write; on a cluster one that all nodes share.

    Returns:
        The manifest, which is written last.

    Raises:
        ConfigError: a path, column or expression of the config does not exist or fit.
        PrepareError: the data cannot be used; the message says what was expected.
        LeakError: something that training learns from lies after the split.
    """
    # Spark takes half a second to import, and a wrong column should be told before that.
    check_columns(config)
    from training.prepare.pipeline import run_pipeline

    _clear(directory)
    with explained(directory, spark.conf.get("spark.local.dir", "/tmp")):
        return run_pipeline(config, spark, directory).save()


def _clear(directory: Path) -> None:
    """Remove what an earlier attempt left, its manifest first."""
    for manifest in (directory / MANIFEST, *directory.glob(f".{MANIFEST}.*")):
        manifest.unlink(missing_ok=True)
    for name in (
        "train",
        "recent",
        "validation",
        "test",
        "corpus",
        "users",
        "vocabularies",
        "impressions",
    ):
        # Killed writers leave hidden siblings of what they were to write.
        for left in (directory / name, *directory.glob(f".{name}.*")):
            if left.exists():
                shutil.rmtree(left)
    directory.mkdir(parents=True, exist_ok=True)
