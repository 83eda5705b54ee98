"""Held-out items in a table of their own: one test query per user, all its items the labels.

The table is joined after everything that learns is built: it reaches no vocabulary, count, corpus
or training example. A query is what batch scoring would ask of its user: the query features as of
the user's last event, whenever its items were taken.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recsys.config import RunConfig
from recsys.data_config import HeldOut
from recsys.schema import Feature
from training.prepare.columns import Home
from training.prepare.errors import LeakError, PrepareError
from training.prepare.sources import Tables
from training.prepare.tfrecords import WindowCounts
from training.prepare.values import LINE_BREAK, identifier, microseconds, spark_type, to_datetime

logger = logging.getLogger(__name__)

_KEY = "data.held_out.columns"


def build_queries(
    events: DataFrame, users: DataFrame, tables: Tables, config: RunConfig
) -> DataFrame:
    """Return one row per user of the held-out table.

    Columns: `user`; `labels`, its items in the order of their ids, those left out that the user
    has seen where the seen is excluded; `seen`, how many these are; `at`, the first time of a
    held-out item, or null; `last_at` of the user's events; `earlier`, how many they are; `warm`,
    whether one trains; `f_<feature>` of query and context features, null of a user without events
    unless the user table has it; `exclusions` if the seen is excluded.

    Args:
        events: flat, with `at` and `trains`.
        users: see `build_users`.
        tables: the held-out table, and features of users that have no event.
        config: the run's.
    """
    held_out = _pairs(tables, config).filter(F.col("reason").isNull())
    queries = held_out.groupBy("user").agg(
        F.array_sort(F.collect_list("item")).alias("labels"), F.min("at").alias("at")
    )
    state = events.groupBy("user").agg(
        F.count(F.lit(1)).alias("earlier"),
        F.max("trains").alias("warm"),
        F.max("at").alias("last_at"),
    )
    for known in (state, _prefixed(users), tables.users):
        queries = queries if known is None else queries.join(known, "user", "left")
    features = [
        _feature(f, config, tables.homes).cast(_type(f)).alias(f"f_{f.name}")
        for f in config.schema_.query
    ]
    none = F.array().cast("array<string>")
    seen = F.coalesce("exclusions", none) if config.data.exclude_seen else none
    labels = F.array_except("labels", seen)
    return queries.select(
        "user",
        labels.alias("labels"),
        (F.size("labels") - F.size(labels)).alias("seen"),
        "at",
        "last_at",
        F.coalesce("earlier", F.lit(0)).alias("earlier"),
        F.coalesce("warm", F.lit(False)).alias("warm"),
        *features,
        *([seen.alias("exclusions")] if config.data.exclude_seen else []),
    )


def askable(queries: DataFrame, config: RunConfig) -> DataFrame:
    """Return the queries that have a label and enough history to be asked."""
    return queries.filter((F.size("labels") > 0) & (F.col("earlier") >= config.data.min_history))


def report_held_out(
    queries: DataFrame, corpus: DataFrame, tables: Tables, config: RunConfig
) -> dict[str, int]:
    """Count the rows of the held-out table, dropped ones by reason, and the labels that are left.

    Rows read are rows dropped (each by one reason) and labels; `labels of no candidate`, which
    nothing can hit, are some of the labels.

    Args:
        queries: see `build_queries`.
        corpus: see `build_corpus`.
        tables: with the held-out table.
        config: the run's.

    Raises:
        PrepareError: the table is empty.
    """
    rows = _pairs(tables, config).groupBy("reason")
    counts = rows.agg(F.sum("rows").alias("rows"), F.count(F.lit(1)).alias("pairs")).collect()
    dropped = {row["reason"]: row["rows"] for row in counts if row["reason"]}
    kept = next((row for row in counts if row["reason"] is None), None)
    if not counts:
        raise PrepareError(
            f"data.held_out: {tables.versions['held_out'].uri} is empty; expected user and item"
        )
    short = F.col("earlier") < config.data.min_history
    size = F.when(short, 0).otherwise(F.size("labels"))
    few, seen, labels = queries.agg(
        F.sum(F.size("labels") - size), F.sum("seen"), F.sum(size)
    ).first()
    asked = askable(queries, config).select(F.explode("labels").alias("item"))
    missing = asked.join(corpus.select("item"), "item", "left_anti").count()
    reasons = ["null user", "null item", "line break in id"]
    reasons += ["impossible time"] if _table(config).columns.time is not None else []
    found = {reason: dropped.get(reason, 0) for reason in reasons}
    found["duplicate"] = 0 if kept is None else kept["rows"] - kept["pairs"]
    found |= {"seen before": seen or 0} if config.data.exclude_seen else {}
    found |= {"history too short": few or 0} if config.data.min_history else {}
    read = {"rows read": sum(row["rows"] for row in counts)}
    report = read | found | {"labels": labels or 0, "labels of no candidate": missing}
    for reason, count in report.items():
        logger.info("held out: %s: %d", reason, count)
    return {f"held out: {reason}": count for reason, count in report.items()}


def count_queries(queries: DataFrame, corpus: DataFrame) -> dict[str, WindowCounts]:
    """Count the test queries, nothing if there is none; cold items have no training event."""
    row = queries.agg(
        F.count(F.lit(1)).alias("num_examples"),
        F.min("at").alias("first_at"),
        F.max("at").alias("last_at"),
        F.count_if(~F.col("warm")).alias("num_cold_users"),
    ).first()
    if not row["num_examples"]:
        return {}
    items = queries.select(F.explode("labels").alias("item")).distinct()
    warm = corpus.filter("count > 0").select("item")
    cold_items = items.join(warm, "item", "left_anti").count()
    return {"test": WindowCounts(window="test", num_cold_items=cold_items, **row.asDict())}


def check_later(queries: DataFrame) -> None:
    """Prove that the held-out items come after all events of their users, where they have times.

    Raises:
        LeakError: naming a user.
    """
    late = queries.filter(F.col("last_at") >= F.col("at"))
    count, first = late.agg(F.count(F.lit(1)), F.min(F.struct("user", "last_at", "at"))).first()
    if count:
        raise LeakError(
            f"{count} users, such as {first['user']!r}, have an event at or after their first "
            f"held-out item ({to_datetime(first['last_at'])}, {to_datetime(first['at'])}): take "
            f"such events out of data.events, or, if the benchmark mixes them, remove {_KEY}.time"
        )


def _table(config: RunConfig) -> HeldOut:
    assert config.data.held_out is not None, "the config asks for it with split.kind=held_out"
    return config.data.held_out


def _pairs(tables: Tables, config: RunConfig) -> DataFrame:
    """Return `user`, `item`, `reason` to drop them or null, how many `rows`, the first `at`."""
    roles, frame = _table(config).columns, tables.held_out
    assert frame is not None, "read_tables reads what the config names"
    user = identifier(frame, roles.user, f"{_KEY}.user")
    item = identifier(frame, roles.item, f"{_KEY}.item")
    at = F.lit(None).cast("bigint")
    reason = F.when(user.isNull(), "null user").when(item.isNull(), "null item")
    reason = reason.when(user.rlike(LINE_BREAK) | item.rlike(LINE_BREAK), "line break in id")
    if roles.time is not None:
        at = microseconds(frame, roles.time, _table(config).time_format)
        reason = reason.when(at.isNull(), "impossible time")
    rows = frame.select(
        user.alias("user"), item.alias("item"), at.alias("at"), reason.alias("reason")
    )
    return rows.groupBy("user", "item", "reason").agg(
        F.count(F.lit(1)).alias("rows"), F.min("at").alias("at")
    )


def _prefixed(users: DataFrame) -> DataFrame:
    """Name the features as events do, so that none is taken for a column of the query."""
    own = ("user", "exclusions")
    return users.select(
        *(F.col(n) if n in own else F.col(n).alias(f"last_{n}") for n in users.columns)
    )


def _feature(feature: Feature, config: RunConfig, homes: Mapping[str, Home]) -> Column:
    """Return what is known of a feature without an event of the query's own."""
    if feature.kind == "history":
        return F.coalesce(f"last_{feature.name}", F.array())
    home, source = homes[feature.name], feature.source_column
    if home == "users":
        return F.col(f"f_{feature.name}")
    if home == "role" and source == "user":
        return F.col("user")
    if home == "role" and source == "time" and feature.side == "context":
        return F.coalesce("at", f"last_{feature.name}")
    return F.col(f"last_{feature.name}")


def _type(feature: Feature) -> str:
    return "array<string>" if feature.kind == "history" else spark_type(feature)
