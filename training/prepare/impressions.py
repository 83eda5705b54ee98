"""What was shown, in a table of its own: one request per list, asked as of the moment it was shown.

A request has the query features that are known strictly before it, as a label has: a click on one
of its own items comes later, and so is in none of them. The table reaches no vocabulary, corpus or
training example of retrieval; the second stage learns from it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys.artifacts import Impressions
from recsys.config import RunConfig
from recsys.data_config import Impressions as Table
from recsys.schema import Feature
from training.prepare.errors import PrepareError
from training.prepare.examples import Known, lengths
from training.prepare.sequences import flat_events
from training.prepare.sources import Tables
from training.prepare.split import SEES, SplitPoints, check_histories
from training.prepare.tfrecords import WindowCounts, write_item_counts, write_requests
from training.prepare.values import (
    LINE_BREAK,
    column,
    feature_value,
    identifier,
    microseconds,
    not_a_number,
    number,
)

logger = logging.getLogger(__name__)

_KEY = "data.impressions"
_JUDGED = ("validation", "test")


def shown_rows(tables: Tables, config: RunConfig) -> DataFrame:
    """Return the rows of the table in canonical columns.

    Columns: `request`, `user`, `item`, `at`, `clicked` (0 or 1), `position` (0 without one),
    `v_<feature>` of candidates' numbers as shown, `f_<feature>` of context features that no other
    table has, `reason` to drop the row or null, `wrong_clicked`, `wrong_position` and
    `wrong_v_<feature>`: the text of a value that cannot be, or null.

    Args:
        tables: with that of shown items.
        config: the run's.
    """
    table, frame = _table(config), tables.impressions
    assert frame is not None, "read_tables reads what the config names"
    roles = table.columns
    ids = {
        role: identifier(frame, getattr(roles, role), f"{_KEY}.columns.{role}")
        for role in ("request", "user", "item")
    }
    at = microseconds(frame, roles.time, table.time_format)
    clicked, position = number(roles.clicked), F.lit(1.0)
    wrong_position = F.lit(None).cast("string")
    if roles.position is not None:
        position = number(roles.position)
        fits = (position >= 1) & (position == F.floor(position))
        wrong_position = _wrong(roles.position, fits)
    reasons = {f"null {role}": value.isNull() for role, value in ids.items()}
    reasons["line break in id"] = ids["user"].rlike(LINE_BREAK) | ids["item"].rlike(LINE_BREAK)
    reasons["impossible time"] = at.isNull()
    return frame.select(
        *(value.alias(role) for role, value in ids.items()),
        at.alias("at"),
        clicked.cast("int").alias("clicked"),
        position.cast("bigint").alias("position"),
        *(number(name).alias(f"v_{feature}") for feature, name in roles.values.items()),
        *(
            feature_value(frame, f, f"feature {f.name!r}", table.time_format).alias(f"f_{f.name}")
            for f in _asked_in(config, tables)
        ),
        F.coalesce(*(F.when(test, F.lit(why)) for why, test in reasons.items())).alias("reason"),
        _wrong(roles.clicked, clicked.isin(0.0, 1.0)).alias("wrong_clicked"),
        wrong_position.alias("wrong_position"),
        *(not_a_number(name).alias(f"wrong_v_{feature}") for feature, name in roles.values.items()),
    )


def report_shown(rows: DataFrame, corpus: DataFrame, config: RunConfig) -> dict[str, int]:
    """Count the rows, dropped ones by reason; `items of no candidate`, never ranked, are kept ones.

    Args:
        rows: see `shown_rows`.
        corpus: see `build_corpus`.
        config: the run's.

    Raises:
        PrepareError: the table is empty, or a label, position or number is none.
    """
    checked = _checked(_table(config))
    found = {
        row["reason"]: row
        for row in rows.groupBy("reason")
        .agg(
            F.count(F.lit(1)).alias("rows"),
            *(
                count(F.col(f"wrong_{role}")).alias(f"{how}_{role}")
                for role in checked
                for how, count in (("num", F.count), ("one", F.min))
            ),
        )
        .collect()
    }
    if not found:
        raise PrepareError(f"{_KEY}: the table is empty; expected a row for each shown item")
    kept = found.pop(None, None)
    if kept is None:
        raise PrepareError(
            f"{_KEY}: no row is left: "
            + ", ".join(f"{reason}: {row['rows']}" for reason, row in found.items())
        )
    for role, (key, name, expected) in checked.items():
        if kept[f"num_{role}"]:
            raise PrepareError(
                f"{_KEY}.columns.{key}: expected {expected} in column {name!r}, but "
                f"{kept[f'num_{role}']} rows have something else, such as "
                f"{kept[f'one_{role}']!r}; convert it with `derive`"
            )
    items = rows.filter(F.col("reason").isNull()).select("item")
    report = {"rows read": sum(row["rows"] for row in found.values()) + kept["rows"]}
    report |= {reason: row["rows"] for reason, row in sorted(found.items())}
    report["items of no candidate"] = items.join(corpus.select("item"), "item", "left_anti").count()
    for reason, count in report.items():
        logger.info("impressions: %s: %d", reason, count)
    return {f"impressions: {reason}": count for reason, count in report.items()}


def build_requests(
    rows: DataFrame, sequences: DataFrame, tables: Tables, config: RunConfig, points: SplitPoints
) -> DataFrame:
    """Return one row per request of all windows that has enough history to be asked.

    Columns: `user`, `request`, `at` (the earliest of its rows), `order` (none), `window`, `shown`
    (an array of structs of `position`, `item`, `clicked` and `v_<feature>`, by position; an item
    that comes twice counts where it came first), `warm`, `f_<feature>` of query and context
    features, and what the leakage check needs, see `build_examples`.

    Args:
        rows: see `shown_rows`.
        sequences: persisted, see `collect_sequences`; of whole users.
        tables: features of users.
        config: the run's.
        points: where the windows begin.
    """
    schema, homes = config.schema_, tables.homes
    requests = _with_earlier(_requests(rows, tables, config, points), sequences)
    requests = requests.filter(F.col("earlier") >= config.data.min_history)

    def record(request: Column) -> Column:
        known = Known(request, F.get(F.col("views"), request["level"] - 1), request["earlier"])
        own = ("request", "at", "order", "window", "shown")
        return F.struct(
            *(request[name].alias(name) for name in own),
            F.coalesce(F.exists("past", lambda e: e["trains"]), F.lit(False)).alias("warm"),
            *(known.feature(f, schema, homes).alias(f"f_{f.name}") for f in schema.query),
            *known.evidence(max(lengths(schema))),
        )

    # One row per user: its history is not copied for each of its requests.
    users = requests.groupBy("user").agg(F.collect_list(F.struct(*requests.columns)).alias("asked"))
    past = sequences.select("user", "past", "views")
    return users.join(past, "user", "left").select("user", F.inline(F.transform("asked", record)))


def write_impressions(requests: DataFrame, config: RunConfig, directory: Path) -> Impressions:
    """Prove that requests know nothing of what came after them, and write them.

    Args:
        requests: persisted, see `build_requests`.
        config: the run's.
        directory: folder of the prepared data.

    Raises:
        LeakError: one knows of something that came after it, or of a later window.
        PrepareError: a window has no list in which something was clicked.
    """
    check_histories(requests, "requests")
    counts = _count(requests, config)
    judged = {
        window: write_requests(requests, config, directory, counts[window]) for window in _JUDGED
    }
    shown = requests.filter(F.col("window") != "test").select("window", F.inline("shown"))
    return Impressions(
        **judged,
        counts=write_item_counts(_by_item(shown), directory),
        longest=requests.agg(F.max(F.size("shown"))).first()[0],
        positions=_table(config).columns.position is not None,
        values=tuple(_table(config).columns.values),
    )


def _checked(table: Table) -> dict[str, tuple[str, str | None, str]]:
    """Key, column and expectation of what may hold something that cannot be, by `wrong_` column."""
    roles = table.columns
    return {
        "clicked": ("clicked", roles.clicked, "1 or 0, true or false"),
        "position": ("position", roles.position, "whole numbers from 1"),
    } | {f"v_{f}": (f"values.{f}", name, "numbers") for f, name in roles.values.items()}


def _table(config: RunConfig) -> Table:
    assert config.data.impressions is not None, "asked of configs with impressions alone"
    return config.data.impressions


def _wrong(name: str, fits: Column) -> Column:
    return F.when(
        ~F.coalesce(fits, F.lit(False)), F.coalesce(column(name).cast("string"), F.lit("null"))
    )


def _asked_in(config: RunConfig, tables: Tables) -> Iterator[Feature]:
    """Yield the context features whose value is that of the request's own row."""
    for feature in config.schema_.query:
        if feature.side == "context" and tables.homes[feature.name] == "events":
            yield feature


def _requests(rows: DataFrame, tables: Tables, config: RunConfig, points: SplitPoints) -> DataFrame:
    """Return a row per request with `window`, `shown` and what is known without its history."""
    kept = rows.filter(F.col("reason").isNull())
    own = [f"f_{f.name}" for f in _asked_in(config, tables)]
    first = F.struct("at", "position", *own)
    values = [f"v_{feature}" for feature in _table(config).columns.values]
    once = kept.groupBy("user", "request", "item").agg(
        F.max("clicked").alias("clicked"),
        F.min(F.struct("position", "at", *values)).alias("place"),
        F.min(first).alias("row"),
    )
    listed = F.array_sort(
        F.collect_list(
            F.struct(
                F.col("place")["position"].alias("position"),
                "item",
                "clicked",
                *(F.col("place")[name].alias(name) for name in values),
            )
        )
    )
    requests = once.groupBy("user", "request").agg(listed.alias("shown"), F.min("row").alias("row"))
    at = F.col("row")["at"]
    window = F.when(at >= points.test_from, "test").when(at >= points.validation_from, "validation")
    requests = requests.select(
        "user",
        "request",
        at.alias("at"),
        F.array().cast("array<double>").alias("order"),
        window.otherwise("train").alias("window"),
        "shown",
        *(F.col("row")[name].alias(name) for name in own),
        *_by_role(config, tables.homes, at),
    )
    names = [f"f_{f.name}" for f in config.schema_.query if tables.homes.get(f.name) == "users"]
    if tables.users is None or not names:
        return requests
    return requests.join(tables.users.select("user", *names), "user", "left")


def _with_earlier(requests: DataFrame, sequences: DataFrame) -> DataFrame:
    """Add `level` and `earlier`, how many events up to this level lie strictly before a request."""
    level = F.coalesce(*(F.when(F.col("window") == name, n) for name, n in SEES.items()))
    events = flat_events(sequences).select("user", "at", F.col("level").alias("event_level"))
    both = requests.withColumn("level", level).unionByName(events, allowMissingColumns=True)
    before = Window.partitionBy("user").orderBy("at").rangeBetween(Window.unboundedPreceding, -1)
    counts = [F.count_if(F.col("event_level") <= n).over(before) for n in SEES.values()]
    earlier = F.get(F.array(*counts), F.col("level") - 1).cast("int")
    asked = both.withColumn("earlier", F.coalesce(earlier, F.lit(0)))
    return asked.filter(F.col("level").isNotNull()).drop("event_level")


def _by_role(config: RunConfig, homes: Mapping[str, str], at: Column) -> Iterator[Column]:
    """Yield the features that are the user's id, or the time of the request."""
    for feature in config.schema_.query:
        role = feature.source_column if homes.get(feature.name) == "role" else ""
        if role == "user":
            yield F.col("user").alias(f"f_{feature.name}")
        elif role == "time" and feature.side == "context":
            yield at.alias(f"f_{feature.name}")


def _count(requests: DataFrame, config: RunConfig) -> dict[str, WindowCounts]:
    any_click = F.exists("shown", lambda one: one["clicked"] == 1)
    found = requests.groupBy("window").agg(
        F.count(F.lit(1)).alias("num_examples"),
        F.min("at").alias("first_at"),
        F.max("at").alias("last_at"),
        F.count_distinct(F.when(~F.col("warm"), F.col("user"))).alias("num_cold_users"),
        F.count_if(any_click).alias("clicked"),
    )
    rows = {row["window"]: row.asDict() for row in found.collect()}
    for window in _JUDGED:
        if not rows.get(window, {}).pop("clicked", 0):
            least = config.data.min_history
            raise PrepareError(
                f"{_KEY}: no list of the {window} window has a clicked item; see data.split for "
                f"when it begins and ends; a request needs data.min_history={least} earlier events"
            )
    return {window: WindowCounts(num_cold_items=0, **rows[window]) for window in _JUDGED}


def _by_item(shown: DataFrame) -> DataFrame:
    """Return `item`, `shown` and `clicked`: arrays over the windows of training and validation."""
    windows = [F.col("window") == name for name in ("train", "validation")]
    times = F.array(*(F.count_if(own) for own in windows))
    clicks = F.array(*(F.count_if(own & (F.col("clicked") == 1)) for own in windows))
    return shown.groupBy("item").agg(times.alias("shown"), clicks.alias("clicked"))
