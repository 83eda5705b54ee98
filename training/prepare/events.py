"""The click table to clean events: canonical columns, and a count for every reason to drop.

Columns of an event: `user`, `item`, `event`, `session` (strings), `at` (microseconds, 0 if the data
has no time), `order` (doubles that order events of equal time), `given` (the split column),
`name` (of the item) and `f_<feature>` for every feature that is read from events or a role.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from pyspark import StorageLevel
from pyspark.errors import AnalysisException, ParseException
from pyspark.sql import Column, DataFrame, Row, Window
from pyspark.sql import functions as F

from recsys.config import ConfigError, RunConfig
from recsys.data_config import Data
from recsys.schema import Feature
from training.prepare.columns import Columns
from training.prepare.errors import PrepareError
from training.prepare.sources import Tables, refuse_type
from training.prepare.values import (
    LINE_BREAK,
    column,
    feature_value,
    identifier,
    microseconds,
    not_a_number,
    number,
    spark_type,
    to_microseconds,
    wrong_value,
)

logger = logging.getLogger(__name__)

_DAY = 86_400_000_000
_WINDOWS = ("train", "validation", "test", "context")


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What is left of the click table.

    Attributes:
        events: the canonical columns.
        cached: what they are read from, persisted; the caller unpersists it.
        report: events read, dropped by reason (each once, so they add up), kept.
        first_at: microseconds of the first event that was kept.
        last_at: microseconds of the last one.
    """

    events: DataFrame
    cached: DataFrame
    report: dict[str, int]
    first_at: int
    last_at: int


@dataclass(frozen=True, slots=True)
class _Check:
    """A column whose values must be of a kind: `wrong` is the text of one that is not.

    `dim` is the size of the vectors that are expected, None where it is something else.
    """

    key: str
    column: str
    wrong: Column
    dim: int | None = None


def clean_events(tables: Tables, config: RunConfig) -> Cleaned:
    """Bring the click table into canonical columns and drop what is no click of a person.

    Raises:
        PrepareError: no event is left, or a column holds values of the wrong type.
        ConfigError: an expression of `cleaning.drop` cannot be used.
    """
    checks = list(_checks(tables, config))
    rows = _with_reason(tables, config, checks)
    if config.data.cleaning.deduplicate:
        rows = _mark_duplicates(rows)
    if config.data.cleaning.max_events_per_day is not None:
        rows = _mark_bots(rows, config.data.cleaning.max_events_per_day)
    rows = rows.persist(StorageLevel.MEMORY_AND_DISK)
    found = {row["reason"]: row for row in rows.groupBy("reason").agg(*_counts(checks)).collect()}
    kept = found.get(None)
    report = _report(found, config.data)
    if kept is None:
        raise PrepareError(_nothing_left(report, tables.versions["events"].uri))
    _refuse_wrong(checks, kept)
    wrong = [f"wrong_{index}" for index in range(len(checks))]
    events = rows.filter(F.col("reason").isNull()).drop("reason", *wrong)
    for reason, count in report.items():
        logger.info("events: %s: %d", reason, count)
    return Cleaned(events, rows, report, kept["first_at"], kept["last_at"])


def _with_reason(tables: Tables, config: RunConfig, checks: list[_Check]) -> DataFrame:
    """Return the canonical columns, `reason` to drop the row or null, and `wrong_<check>`."""
    data, frame = config.data, tables.events
    roles = data.events.columns
    null = F.lit(None).cast("string")
    role = _role_values(tables, data)
    given = column(data.split.column).cast("string") if data.split.kind == "given" else null
    session = null
    if roles.session is not None:
        session = identifier(frame, roles.session, "data.events.columns.session")
    name = null
    if data.item_name in Columns(tuple(frame.columns), ""):
        name = identifier(frame, str(data.item_name), "data.item_name")
    columns = {
        **role,
        "order": F.array(*(number(order) for order in roles.order)).cast("array<double>"),
        "session": session,
        "given": given,
        "name": name,
        **{f"f_{f.name}": _feature(tables, f, data, role) for f in _event_features(tables, config)},
        **{f"wrong_{index}": check.wrong for index, check in enumerate(checks)},
    }
    try:
        rows = frame.select(
            *(value.alias(key) for key, value in columns.items()),
            _first_reason(_row_reasons(data, role)).alias("reason"),
        )
    except (AnalysisException, ParseException) as error:
        text = str(error).strip().splitlines()[0]
        raise ConfigError(f"data.cleaning.drop: {text}") from error
    return rows.withColumn("at", F.coalesce("at", F.lit(0).cast("bigint")))


def _role_values(tables: Tables, data: Data) -> dict[str, Column]:
    roles, frame, key = data.events.columns, tables.events, "data.events.columns"
    at, event = F.lit(None).cast("bigint"), F.lit(None).cast("string")
    if roles.time is not None:
        at = microseconds(frame, roles.time, data.events.time_format)
    if roles.event is not None:
        event = identifier(frame, roles.event, f"{key}.event")
    return {
        "user": identifier(frame, roles.user, f"{key}.user"),
        "item": identifier(frame, roles.item, f"{key}.item"),
        "event": event,
        "at": at,
    }


def _event_features(tables: Tables, config: RunConfig) -> Iterator[Feature]:
    """Yield the features whose values stand in the click table or are a role."""
    for feature in config.features:
        if tables.homes.get(feature.name) in ("role", "events"):
            yield feature


def _feature(tables: Tables, feature: Feature, data: Data, role: dict[str, Column]) -> Column:
    if tables.homes[feature.name] == "role":
        value = role["at" if feature.source_column == "time" else feature.source_column]
        return value.cast(spark_type(feature))
    key = f"feature {feature.name!r}"
    return feature_value(tables.events, feature, key, data.events.time_format)


def _row_reasons(data: Data, role: dict[str, Column]) -> dict[str, Column]:
    """Return the reasons that a row alone can tell, in the order in which they count."""
    reasons = {"null user": role["user"].isNull(), "null item": role["item"].isNull()}
    reasons["line break in id"] = role["user"].rlike(LINE_BREAK) | role["item"].rlike(LINE_BREAK)
    if data.events.columns.time is not None:
        at, cleaning = role["at"], data.cleaning
        impossible = at.isNull()
        if cleaning.not_before is not None:
            impossible |= at < to_microseconds(cleaning.not_before)
        if cleaning.not_after is not None:
            impossible |= at > to_microseconds(cleaning.not_after)
        reasons["impossible time"] = impossible
    for reason, predicate in data.cleaning.drop.items():
        if reason in reasons:
            raise ConfigError(f"data.cleaning.drop: {reason!r} is a reason of its own already")
        reasons[reason] = F.expr(predicate)
    if data.event_types:
        listed = role["event"].isin(*data.event_types)
        reasons["event type not listed"] = ~F.coalesce(listed, F.lit(False))
    return reasons


def _first_reason(reasons: dict[str, Column]) -> Column:
    return F.coalesce(*(F.when(test, F.lit(reason)) for reason, test in reasons.items()))


def _mark_duplicates(rows: DataFrame) -> DataFrame:
    """Keep one of the events that agree in user, item, type, time and order columns."""
    # Rows are told apart by all their values, so that it is always the same one that stays.
    same = Window.partitionBy("reason", "user", "item", "event", "at", "order")
    nth = F.row_number().over(same.orderBy(F.xxhash64(*rows.columns)))
    duplicate = F.col("reason").isNull() & (nth > 1)
    return rows.withColumn("reason", F.when(duplicate, "duplicate").otherwise(F.col("reason")))


def _mark_bots(rows: DataFrame, limit: int) -> DataFrame:
    """Drop all events of users with more than `limit` events on any day (UTC)."""
    day = F.floor(F.col("at") / _DAY)
    # Rows that are dropped already are spread out: millions may share the null user.
    dropped = F.when(F.col("reason").isNotNull(), F.xxhash64(*rows.columns))
    by_day = Window.partitionBy("user", "dropped", "day")
    by_user = Window.partitionBy("user", "dropped")
    marked = rows.withColumns({"dropped": dropped, "day": day})
    marked = marked.withColumn("busy", F.count(F.lit(1)).over(by_day))
    bot = F.col("reason").isNull() & (F.max("busy").over(by_user) > limit)
    reason = F.when(bot, "bot-like user").otherwise(F.col("reason"))
    return marked.withColumn("reason", reason).drop("dropped", "day", "busy")


def _checks(tables: Tables, config: RunConfig) -> Iterator[_Check]:
    for index, name in enumerate(config.data.events.columns.order):
        yield _Check(f"data.events.columns.order.{index}", name, not_a_number(name))
    for feature in config.features:
        if tables.homes.get(feature.name) == "events":
            wrong = wrong_value(feature, _owner(tables, config.data))
            if wrong is not None:
                key = f"feature {feature.name!r}"
                yield _Check(key, feature.source_column, wrong, feature.vector_dim)
    if config.data.split.kind == "given":
        name = config.data.split.column
        value = F.coalesce(column(name).cast("string"), F.lit("null"))
        yield _Check("data.split.column", name, F.when(~value.isin(*_WINDOWS), value))


def _owner(tables: Tables, data: Data) -> Column:
    values = _role_values(tables, data)
    user, item = (F.coalesce(values[role], F.lit("null")) for role in ("user", "item"))
    return F.concat(F.lit("item "), item, F.lit(" of user "), user)


def _counts(checks: list[_Check]) -> Iterator[Column]:
    yield F.count(F.lit(1)).alias("count")
    yield F.min("at").alias("first_at")
    yield F.max("at").alias("last_at")
    for index in range(len(checks)):
        yield F.count(f"wrong_{index}").alias(f"num_wrong_{index}")
        yield F.min(f"wrong_{index}").alias(f"example_{index}")


def _refuse_wrong(checks: list[_Check], kept: Row) -> None:
    for index, check in enumerate(checks):
        num_wrong, example = kept[f"num_wrong_{index}"], kept[f"example_{index}"]
        if num_wrong and check.key == "data.split.column":
            raise PrepareError(
                f"{check.key}: expected one of {', '.join(_WINDOWS)} in column {check.column!r}, "
                f"but {num_wrong} events have something else, such as {example!r}"
            )
        if num_wrong:
            refuse_type(check.key, check.column, num_wrong, example, check.dim)


def _report(found: dict[str | None, Row], data: Data) -> dict[str, int]:
    reasons = ["null user", "null item", "line break in id"]
    reasons += ["impossible time"] if data.events.columns.time is not None else []
    reasons += list(data.cleaning.drop)
    reasons += ["event type not listed"] if data.event_types else []
    reasons += ["duplicate"] if data.cleaning.deduplicate else []
    reasons += ["bot-like user"] if data.cleaning.max_events_per_day is not None else []
    counts = {reason: found[reason]["count"] if reason in found else 0 for reason in reasons}
    kept = found[None]["count"] if None in found else 0
    return {"events read": sum(counts.values()) + kept, **counts, "kept": kept}


def _nothing_left(report: dict[str, int], uri: str) -> str:
    if report["events read"] == 0:
        return f"data.events: {uri} is empty; expected at least one event"
    dropped = ", ".join(f"{reason}: {n}" for reason, n in report.items() if n and reason != "kept")
    return f"data.events: no event of {uri} is left after cleaning ({dropped}); see data.cleaning"
