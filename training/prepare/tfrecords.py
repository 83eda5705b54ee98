"""Write the shards of examples, the corpus and the users; read the records back to count them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recsys.artifacts import Corpus, Examples, Queries, Sequences
from recsys.config import RunConfig
from recsys.judged import PREFIX
from recsys.schema import Feature, Schema, as_shown, missing_value
from training.prepare.errors import PrepareError
from training.prepare.outcomes import listed_outcomes
from training.prepare.values import spark_type, to_datetime

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WindowCounts:
    """Examples of one window: how many, from when to when (microseconds), how many cold.

    Labels without time have null times, or 0 in place of them.
    """

    window: str
    num_examples: int
    first_at: int | None
    last_at: int | None
    num_cold_users: int
    num_cold_items: int


def write_examples(
    examples: DataFrame, config: RunConfig, directory: Path, count: WindowCounts
) -> Examples:
    """Write the examples of one window to the folder of its name.

    The shard of an example and its place in it depend on user, position and seed alone, so that
    the same input gives the same bytes on any cluster. `time` is the label's; in data without time
    it is the first order column, which says as much about what came before what.

    Args:
        examples: see `build_examples`.
        config: the run's.
        directory: folder of the prepared data.
        count: what is to be written.

    Raises:
        PrepareError: another number of records is read back than was to be written.
    """
    fields = [
        "user",
        _moment(F.struct("at", "order"), config).alias("time"),
        F.col("item").alias("label"),
        "weight",
        *(listed_outcomes() if config.needs_outcomes else ()),
        *_asked_with(config),
    ]
    own = examples.filter(F.col("window") == count.window)
    shards = _sharded(own, config, "user", "position").select(*fields)
    by_file = _write_records(shards, directory / count.window, count.num_examples)
    logger.info("%s: %d examples", count.window, count.num_examples)
    return Examples(path=count.window, num_files=len(by_file), **_told(count, config))


def _asked_with(config: RunConfig) -> list[str | Column]:
    """What a query is asked with, whatever its labels."""
    exclusions = ["exclusions"] if config.data.exclude_seen else []
    return [*exclusions, *(F.col(f"f_{f.name}").alias(f.name) for f in config.schema_.query)]


def write_queries(
    queries: DataFrame, config: RunConfig, directory: Path, count: WindowCounts
) -> Queries:
    """Write queries of several labels to the folder of their window, a record each.

    A record is as `write_examples` makes it, but `label` is a list, there is no `weight`, and
    `time` is that of the first label, absent without time stamps.

    Args:
        queries: see `build_queries`.
        config: the run's.
        directory: folder of the prepared data.
        count: what is to be written.

    Raises:
        PrepareError: another number of records is read back than was to be written.
    """
    fields = [
        "user",
        F.col("at").alias("time"),
        F.col("labels").alias("label"),
        *_asked_with(config),
    ]
    shards = _sharded(queries, config, "user").select(*fields)
    by_file = _write_records(shards, directory / count.window, count.num_examples)
    num_labels = queries.agg(F.sum(F.size("labels"))).first()[0]
    logger.info("%s: %d queries, %d labels", count.window, count.num_examples, num_labels)
    return Queries(
        path=count.window, num_files=len(by_file), num_labels=num_labels, **_told(count, config)
    )


def write_requests(
    requests: DataFrame, config: RunConfig, directory: Path, count: WindowCounts
) -> Queries:
    """Write the shown lists of a window to `impressions/` and its name, a record each.

    A record is that of a query without exclusions: `label` are the clicked items; `shown_items`,
    `shown_positions` and numbers `as_shown` are of all of them, by position.

    Args:
        requests: see `build_requests`.
        config: the run's.
        directory: folder of the prepared data.
        count: what is to be written.

    Raises:
        PrepareError: another number of records is read back than was to be written.
    """
    own = requests.filter(F.col("window") == count.window)
    clicked = F.filter("shown", lambda one: one["clicked"] == 1)
    fields = [
        "user",
        F.col("at").alias("time"),
        clicked["item"].alias("label"),
        F.col("shown")["item"].alias("shown_items"),
        F.col("shown")["position"].alias("shown_positions"),
        *_as_shown(config),
        *(F.col(f"f_{f.name}").alias(f.name) for f in config.schema_.query),
    ]
    shards = _sharded(own, config, "user", "request").select(*fields)
    path = f"impressions/{count.window}"
    by_file = _write_records(shards, directory / path, count.num_examples)
    num_labels = own.agg(F.sum(F.size(clicked))).first()[0]
    logger.info("%s: %d lists, %d clicks", path, count.num_examples, num_labels)
    return Queries(path=path, num_files=len(by_file), num_labels=num_labels, **_told(count, config))


def _as_shown(config: RunConfig) -> Iterator[Column]:
    """Yield the numbers of shown items, NaN for none."""
    table = config.data.impressions
    for name in table.columns.values if table is not None else ():
        values = F.col("shown")[f"v_{name}"]
        floats = F.transform(values, lambda v: F.coalesce(v, F.lit(float("nan"))).cast("float"))
        yield floats.alias(as_shown(name))


def write_item_counts(counts: DataFrame, directory: Path) -> str:
    """Write how often items were shown and clicked into one file, and return its folder."""
    path = "impressions/counts"
    ordered = counts.repartition(1).sortWithinPartitions("item")
    _write_records(ordered, directory / path, counts.count())
    return path


def _sharded(frame: DataFrame, config: RunConfig, *key: str) -> DataFrame:
    shuffled = F.xxhash64(*key, F.lit(config.seed))
    return frame.repartition(config.data.shards, *key).sortWithinPartitions(shuffled, *key)


def write_sequences(
    training: DataFrame, config: RunConfig, folder: Path, count: WindowCounts
) -> Sequences:
    """Write training sequences, a record each; order and shards as `write_examples` makes them.

    A record holds the user, the histories, and lists over the labels: `label`, `known` (how many
    events of the histories are before it), `time`, `weight` and the other query features; with
    `model.joint` also the lists of `recsys.judged` over the judged events.

    Args:
        training: see `build_training`.
        config: the run's.
        folder: to write, inside of the prepared data.
        count: of the labels that are to be written.

    Raises:
        PrepareError: another number of records is read back than was to be written.
    """
    # No two sequences of a user begin with the same label, whichever session they are of.
    names = {"label": "item", "known": "known", "weight": "weight"}
    lists = [F.col("labels")[column].alias(name) for name, column in names.items()]
    lists.append(F.transform("labels", lambda label: _moment(label, config)).alias("time"))
    lists += [_listed(feature).alias(feature.name) for feature in config.schema_.query]
    first = F.get("labels", F.lit(0))["position"]
    if config.model.joint is not None:
        # There may be no label among them.
        first = F.coalesce(first, F.get("judged", F.lit(0))["position"])
        lists += _judged(config.schema_)
    training = training.withColumn("position", first)
    shards = _sharded(training, config, "user", "position")
    found = training.agg(F.count(F.lit(1)), F.sum(F.size("labels"))).first()
    if found[1] != count.num_examples:
        raise PrepareError(f"{folder}: expected {count.num_examples} labels, found {found[1]}")
    by_file = _write_records(shards.select("user", *lists), folder, found[0])
    logger.info("%s: %d sequences, %d labels", folder.name, *found)
    return Sequences(
        path=folder.name,
        num_files=len(by_file),
        num_sequences=found[0],
        sequences_by_file=by_file,
        **_told(count, config),
    )


def _moment(event: Column, config: RunConfig) -> Column:
    """Return the time of an event, or its first order column where the data have no time."""
    if config.data.events.columns.time is not None:
        return event["at"]
    return F.coalesce(F.get(event["order"], F.lit(0)).cast("bigint"), F.lit(-1))


def _judged(schema: Schema) -> list[Column]:
    """Return the lists over the judged events, see `recsys.judged`."""
    own = {name: F.col("judged")[name] for name in ("item", "known", "event", "weight")}
    own |= {f.name: _listed(f, "judged") for f in schema.query if f.kind != "history"}
    return [values.alias(f"{PREFIX}{name}") for name, values in own.items()]


def _listed(feature: Feature, over: str = "labels") -> Column:
    if feature.kind == "history":
        return F.col(f"h_{feature.name}")
    missing = F.lit(missing_value(feature)).cast(spark_type(feature))
    values = F.transform(F.col(over)[f"f_{feature.name}"], lambda value: F.coalesce(value, missing))
    # tf.Example knows no lists of lists: the vectors of a record stand one after the other.
    return F.flatten(values) if feature.vector_dim else values


def _told(count: WindowCounts, config: RunConfig) -> dict[str, Any]:
    has_time = config.data.events.columns.time is not None
    first_at, last_at = (count.first_at, count.last_at) if has_time else (None, None)
    return {
        "num_examples": count.num_examples,
        "first_at": None if first_at is None else to_datetime(first_at),
        "last_at": None if last_at is None else to_datetime(last_at),
        "num_cold_users": count.num_cold_users,
        "num_cold_items": count.num_cold_items,
    }


def write_corpus(corpus: DataFrame, schema: Schema, directory: Path) -> Corpus:
    """Write all candidates into one file, by falling count, then by id (bytewise)."""
    fields = ["item", "name", "count", "labels"]
    features = [F.col(f"f_{f.name}").alias(f.name) for f in schema.candidate]
    counted = corpus.agg(F.count(F.lit(1)), F.count_if(F.col("count") > 0)).first()
    ordered = corpus.repartition(1).sortWithinPartitions(F.col("count").desc(), "item")
    _write_records(ordered.select(*fields, *features), directory / "corpus", counted[0])
    logger.info("corpus: %d items, %d with training events", *counted)
    return Corpus(path="corpus", num_items=counted[0], num_warm=counted[1])


def write_users(users: DataFrame, shards: int, directory: Path) -> int:
    """Write the users as Parquet, each file sorted by user, and return how many they are."""
    ordered = users.repartition(shards, "user").sortWithinPartitions("user")
    ordered.write.mode("overwrite").parquet(str(directory / "users"))
    count = int(users.sparkSession.read.parquet(str(directory / "users")).count())
    logger.info("users: %d", count)
    return count


def _write_records(frame: DataFrame, folder: Path, expected: int) -> tuple[int, ...]:
    """Write TFRecords, read them back (which checks their CRCs), return how many each file has."""
    writer = frame.write.format("tfrecord").option("recordType", "Example")
    writer.mode("overwrite").save(str(folder))
    reader = frame.sparkSession.read.format("tfrecord").option("recordType", "ByteArray")
    # A file is one partition, and they are in order.
    by_partition = reader.load(str(folder)).groupBy(F.spark_partition_id().alias("file")).count()
    counts = {row["file"]: row["count"] for row in by_partition.collect()}
    if sum(counts.values()) != expected:
        raise PrepareError(
            f"{folder}: expected {expected} records, read back {sum(counts.values())}: "
            "the input changed while it was read, or a disk lost data; run again"
        )
    return tuple(counts.get(file, 0) for file in range(len(list(folder.glob("part-*")))))
