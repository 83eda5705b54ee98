"""Which event trains, validates or tests, and the proof that nothing learns from the future."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys.data_config import Data
from recsys.split_config import HeldOutSplit, Split, TimeSplit
from training.prepare.errors import LeakError, PrepareError
from training.prepare.values import to_datetime, to_microseconds

logger = logging.getLogger(__name__)

#: Highest `level` of the events that a label of the window may have in its history.
SEES = {"train": 1, "validation": 2, "test": 3}

#: Windows in the order in which information may flow.
STAGES = ("context", "train", "validation", "test")


@dataclass(frozen=True, slots=True)
class SplitPoints:
    """Microseconds at which validation and test begin."""

    validation_from: int
    test_from: int


def split_points(split: Split, last_at: int) -> SplitPoints | None:
    """Return where the windows begin, None where time does not split.

    Days count back from the last event, those of validation from where test begins. Held-out items
    test after all events.

    Raises:
        PrepareError: validation would not begin before test.
    """
    if not isinstance(split, TimeSplit | HeldOutSplit) or not split.by_time:
        return None
    if isinstance(split, HeldOutSplit):
        test_from = last_at + 1
    elif split.test_from is not None:
        test_from = to_microseconds(split.test_from)
    else:
        test_from = last_at - _micros(split.test_days)
    if split.validation_from is not None:
        validation_from = to_microseconds(split.validation_from)
    else:
        validation_from = test_from - _micros(split.validation_days)
    if validation_from >= test_from:
        raise PrepareError(
            f"data.split: validation begins {to_datetime(validation_from)}, which is not before "
            f"the test window, which begins {to_datetime(test_from)}"
        )
    return SplitPoints(validation_from, test_from)


def _micros(days: float | None) -> int:
    return timedelta(days=days or 0) // timedelta(microseconds=1)


def assign_windows(events: DataFrame, data: Data, points: SplitPoints | None) -> DataFrame:
    """Add `window`: train, validation, test or context.

    Args:
        events: with `user`, `position`, `at`, `given` and `labelable`.
        data: its `split` decides.
        points: where time splits, else None.
    """
    if points is not None:
        window = F.when(F.col("at") >= points.test_from, "test").when(
            F.col("at") >= points.validation_from, "validation"
        )
        return events.withColumn("window", window.otherwise("train"))
    if data.split.kind == "given":
        return events.withColumn("window", F.col("given"))
    last = ("validation",) if data.split.kind == "held_out" else ("test", "validation")
    return events.withColumn("window", _leave_last_out(last))


def _leave_last_out(windows: Sequence[str]) -> Column:
    """Return the window by how many events that can be labels follow; none: the first window.

    Events that are no labels go with the next label, so that none lies after what it trains.
    """
    user = Window.partitionBy("user")
    following = user.orderBy("position").rowsBetween(1, Window.unboundedFollowing)
    labels = F.col("labelable").cast("int")
    after = F.coalesce(F.sum(labels).over(following), F.lit(0))
    enough = F.sum(labels).over(user) > len(windows)
    window = F.lit("train")
    for number, name in enumerate(windows):
        window = F.when(enough & (after == number), name).otherwise(window)
    return window


def mark_rare(events: DataFrame, data: Data) -> DataFrame:
    """Add `rare`: item, user or null; training events below the minimum counts, items first."""
    events = events.withColumn("rare", F.lit(None).cast("string"))
    minimum = {"item": data.cleaning.min_item_events, "user": data.cleaning.min_user_events}
    for key, least in minimum.items():
        if least > 1:
            training = events.filter((F.col("window") == "train") & F.col("rare").isNull())
            few = training.groupBy(key).count().filter(F.col("count") < least)
            events = events.join(few.select(key, F.lit(True).alias("few")), key, "left")
            rare = F.when((F.col("window") == "train") & F.col("few"), key)
            events = events.withColumn("rare", F.coalesce("rare", rare)).drop("few")
    return events


def add_levels(events: DataFrame) -> DataFrame:
    """Add `trains` (counts as a training event) and `level` (who may have it in a history).

    Level 1 is seen by training, validation and test, 2 by validation and test, 3 by test alone.
    """
    window = F.col("window")
    trains = (window == "train") & F.col("rare").isNull()
    level = F.when(trains | (window == "context"), 1).when(window == "test", 3).otherwise(2)
    return events.withColumns({"trains": trains, "level": level})


def check_no_leak(
    events: DataFrame,
    examples: DataFrame,
    training: DataFrame,
    vocabularies: DataFrame,
    split: Split,
    points: SplitPoints | None,
) -> None:
    """Prove on the data that nothing learns from what it is tested on.

    Args:
        events: with `user`, `at`, `order`, `window`, `trains` and `f_<feature>` of the
            vocabularies' features.
        examples: with `window`, `at`, `order` of the label; `newest`, a struct of `at` and `order`
            of the latest event that its query features were made from; `stage`, the highest index
            in `STAGES` of the window of one of these events.
        training: of all windows that are learned from, see `build_training`.
        vocabularies: `feature` and `value`, a row per line of the files.
        split: the rule; a given one decides itself what may be learned before what.
        points: where time splits, else None.

    Raises:
        LeakError: naming what leaks.
    """
    _check_training_events(events, points)
    if split.kind != "given":
        _check_order_of_users(events)
    check_histories(examples, "examples")
    check_histories(_evidence(training), "training labels")
    _check_vocabularies(events, vocabularies)


def _check_training_events(events: DataFrame, points: SplitPoints | None) -> None:
    training = events.filter("trains")
    late = F.lit(False) if points is None else F.col("at") >= points.validation_from
    found = training.agg(
        F.count_if(F.col("window") != "train").alias("elsewhere"),
        F.count_if(late).alias("late"),
        F.max("at").alias("last_at"),
    ).first()
    if found["elsewhere"]:
        raise LeakError(
            f"{found['elsewhere']} events outside the training window are counted as training"
        )
    if points is not None and found["late"]:
        raise LeakError(
            f"{found['late']} training events lie at or after "
            f"{to_datetime(points.validation_from)}, where validation begins; "
            f"the last is of {to_datetime(found['last_at'])}"
        )


def _check_order_of_users(events: DataFrame) -> None:
    moment, window = F.struct("at", "order"), F.col("window")
    users = events.groupBy("user").agg(
        F.max(F.when(F.col("trains"), moment)).alias("trained"),
        F.min(F.when(window.isin("validation", "test"), moment)).alias("tested"),
    )
    late = users.filter(F.col("trained") > F.col("tested"))
    found = late.agg(F.count(F.lit(1)), F.min("user")).first()
    if found[0]:
        raise LeakError(
            f"{found[0]} users, such as {found[1]!r}, have a training event that lies after their "
            "first validation or test event"
        )


def _evidence(training: DataFrame) -> DataFrame:
    """Return a row per label or judged event with what `build_examples` gives as evidence."""
    lists = [name for name in ("labels", "judged") if name in training.columns]
    columns = ("moments", "stages", "known", "at", "order", "window")
    parts = [training.select("moments", "stages", F.inline(one)).select(*columns) for one in lists]
    rows = reduce(DataFrame.unionByName, parts)
    known = F.col("known")
    return rows.withColumns(
        {
            "newest": F.array_max(F.slice("moments", F.lit(1), known)),
            "stage": F.array_max(F.slice("stages", F.lit(1), known)),
        }
    )


def check_histories(examples: DataFrame, what: str) -> None:
    """Prove that what query features were made from is strictly earlier and of no later window.

    Args:
        examples: see `check_no_leak`.
        what: they are, for the message.

    Raises:
        LeakError: it is not.
    """
    stage = F.array_position(F.lit(list(STAGES)), F.col("window")) - 1
    found = examples.agg(
        F.count_if(F.col("newest") >= F.struct("at", "order")).alias("late"),
        F.count_if(F.col("stage") > stage).alias("hidden"),
    ).first()
    if found["late"]:
        raise LeakError(
            f"{found['late']} {what} have an event in their history that is not before the label"
        )
    if found["hidden"]:
        raise LeakError(
            f"{found['hidden']} {what} have an event of a later window in their history"
        )


def _check_vocabularies(events: DataFrame, vocabularies: DataFrame) -> None:
    features = sorted(row[0] for row in vocabularies.select("feature").distinct().collect())
    if not features:
        return
    pairs = F.array(
        *(
            F.struct(F.lit(name).alias("feature"), F.col(f"f_{name}").cast("string").alias("value"))
            for name in features
        )
    )
    training = events.filter(F.col("window") == "train").select(F.inline(pairs)).distinct()
    unknown = vocabularies.join(training, ["feature", "value"], "left_anti")
    found = unknown.agg(F.count(F.lit(1)).alias("count"), F.min(F.struct("*")).alias("first"))
    row = found.first()
    if row["count"]:
        raise LeakError(
            f"vocabulary {row['first']['feature']!r} holds {row['first']['value']!r}, "
            f"which no training event has ({row['count']} such values in all vocabularies)"
        )
