"""Vocabularies and number statistics: what training learns of the values, from training alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from recsys.artifacts import Statistics, VocabularyFile
from recsys.schema import Feature, Schema
from training.prepare.values import LINE_BREAK

logger = logging.getLogger(__name__)

FOLDER = "vocabularies"


def write_vocabularies(
    events: DataFrame, schema: Schema, directory: Path
) -> dict[str, VocabularyFile]:
    """Count the values of ids and categories in training events and write a file for each feature.

    Values are ordered by falling count, then bytewise. Values with line breaks go to the
    out-of-vocabulary buckets: a file has one value a line.

    Args:
        events: with `trains` and `f_<feature>`.
        schema: of the run.
        directory: folder of the prepared data.
    """
    features = schema.vocabularies
    values: dict[str, list[str]] = {feature.name: [] for feature in features}
    for row in _ranked(events, features).toLocalIterator(prefetchPartitions=True):
        values[row["feature"]].append(row["value"])
    (directory / FOLDER).mkdir(parents=True)
    files = {}
    for feature in features:
        path = f"{FOLDER}/{feature.name}.txt"
        lines = values[feature.name]
        (directory / path).write_text("".join(f"{v}\n" for v in lines), "utf-8", newline="\n")
        rule = feature.vocabulary
        files[feature.name] = VocabularyFile(path=path, size=len(lines), oov=rule.oov)
        logger.info("vocabulary %s: %d values", feature.name, len(lines))
    return files


def read_vocabularies(spark: SparkSession, directory: Path) -> DataFrame:
    """Return `feature` and `value` of every line, read back from the files."""
    lines = spark.read.option("lineSep", "\n").text(str(directory / FOLDER))
    feature = F.regexp_extract("_metadata.file_name", r"(\w+)\.txt$", 1)
    return lines.select(feature.alias("feature"), "value")


def _ranked(events: DataFrame, features: Iterable[Feature]) -> DataFrame:
    """Return `feature` and `value`, in the order of the files."""
    pairs = [
        F.struct(F.lit(f.name).alias("feature"), F.col(f"f_{f.name}").alias("value"))
        for f in features
    ]
    valid = F.col("value").isNotNull() & ~F.col("value").rlike(LINE_BREAK)
    training = events.filter("trains").select(F.inline(F.array(*pairs))).filter(valid)
    counts = training.groupBy("feature", "value").count()
    frequent = counts.filter(F.col("count") >= _limit(features, "min_count", 1))
    falling = Window.partitionBy("feature").orderBy(F.col("count").desc(), "value")
    ranked = frequent.withColumn("row", F.row_number().over(falling))
    kept = ranked.filter(F.col("row") <= _limit(features, "max_size", 2**31 - 1))
    return kept.repartition(1).sortWithinPartitions("feature", "row").select("feature", "value")


def _limit(features: Iterable[Feature], rule: str, default: int) -> Column:
    limit = F.lit(default)
    for feature in features:
        value = getattr(feature.vocabulary, rule)
        if value is not None:
            limit = F.when(F.col("feature") == feature.name, F.lit(value)).otherwise(limit)
    return limit


def number_statistics(
    labels: DataFrame, corpus: DataFrame, schema: Schema
) -> dict[str, Statistics]:
    """Return mean and standard deviation of the numbers.

    Args:
        labels: of training, with `f_<feature>`; query and context numbers are taken over them.
        corpus: with `count`; candidate numbers are taken over items with training events.
        schema: of the run.
    """
    tables = (
        (labels, schema.query),
        (corpus.filter("count > 0"), schema.candidate),
    )
    found: dict[str, Statistics] = {}
    for frame, features in tables:
        names = [feature.name for feature in features if feature.kind == "number"]
        if not names:
            continue
        value = {name: F.col(f"f_{name}").cast("double") for name in names}
        row = frame.agg(
            *(F.avg(value[name]).alias(f"mean_{name}") for name in names),
            *(F.stddev_pop(value[name]).alias(f"std_{name}") for name in names),
        ).first()
        for name in names:
            mean, std = _rounded(row[f"mean_{name}"]), _rounded(row[f"std_{name}"])
            found[name] = Statistics(mean=mean, std=std or 1.0)
    return found


def _rounded(value: float | None) -> float:
    """Round to 9 digits: the last bits of a sum depend on the order in which tasks end."""
    return float(f"{value or 0.0:.9g}")
