"""Users whose answer is known: the last scoring had the same inputs, of the same version and k."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from recsys.artifacts import ArtifactError

logger = logging.getLogger(__name__)

#: Column of a result: hash of all that its row was computed from.
INPUTS = "inputs"
#: Columns that are added to a table of users; no feature can be called so.
HASH, KEPT = "_inputs", "_kept"
#: Columns of a result that are an answer; the last where the model explores.
LISTS = ("items", "scores", "propensities")


def with_inputs(users: DataFrame, version: dict[str, str], k: int) -> DataFrame:
    """Add `_inputs`, a hash of the user's columns, of the version that answers, and of k.

    Args:
        users: `user` and further columns, all of which count.
        version: what tells a version from all others.
        k: items wanted.
    """
    columns = sorted(name for name in users.columns if name != "user")
    told = json.dumps(version | {"k": str(k)}, sort_keys=True)
    return users.withColumn(HASH, json_hash(columns, told))


def json_hash(columns: Sequence[str], further: str = "") -> Column:
    """Hash the values of columns as JSON, in which no two rows look the same.

    Spark's hash of several columns skips what is missing and joins lists.
    """
    # Without columns there is no struct; all rows are alike then.
    values = [F.col(f"`{name}`") for name in columns]
    return F.xxhash64(F.to_json(F.struct(*values)) if values else F.lit(""), F.lit(further))


def with_last(users: DataFrame, last: DataFrame) -> DataFrame:
    """Add `_kept`: the lists of the last scoring, null where the inputs are not the same.

    Args:
        users: see `with_inputs`.
        last: its result.
    """
    lists = [name for name in LISTS if name in last.columns]
    answers = last.select(
        F.col("user").alias("_user"),
        F.col(INPUTS).alias("_last"),
        F.struct(*lists).alias(KEPT),
    ).dropDuplicates(["_user", "_last"])
    same = (F.col("user").cast("string") == F.col("_user")) & (F.col(HASH) == F.col("_last"))
    return users.join(answers, same, "left").drop("_user", "_last")


def last_result(spark: SparkSession, place: str | Path) -> DataFrame | None:
    """Read the last result from a table or a folder; None where there is none that can be used.

    Raises:
        ArtifactError: the folder or table holds something else than recommendations.
    """
    if isinstance(place, Path):
        if not any(place.glob("part-*.parquet")):
            return None
        last = spark.read.parquet(str(place))
    else:
        if not spark.catalog.tableExists(place):
            return None
        last = spark.table(place)
    missing = {"user", "items", "scores"} - set(last.columns)
    if missing:
        raise ArtifactError(f"{place} holds no recommendations: it has no {', '.join(missing)}")
    if INPUTS not in last.columns:
        logger.info("%s does not tell what it was made from: all users are scored", place)
        return None
    return last
