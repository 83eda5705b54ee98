"""What a user did from a label on: the events of all types that the ranker's tasks predict.

They end with the session, so that a request late in its window is asked for about as much as an
early one, and with the window, so that nothing trained on validation comes from the test.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from training.prepare.errors import LeakError


def add_outcomes(events: DataFrame) -> DataFrame:
    """Add `outcomes`: structs of `item`, `event`, `window` and `moment`; null in training.

    Those of an event are itself, its peers and what comes after it in its session and window.

    Args:
        events: with `user`, `session`, `window`, `at`, `order`, `item` and `event`.
    """
    # No row frame: peers, which no history lists, belong to what happens from here on.
    rest = Window.partitionBy("user", "session", "window").orderBy("at", "order")
    rest = rest.rangeBetween(Window.currentRow, Window.unboundedFollowing)
    judged = F.col("window").isin("validation", "test")
    own = F.struct("item", "event", "window", F.struct("at", "order").alias("moment"))
    return events.withColumn(
        "outcomes", F.when(judged, F.collect_list(F.when(judged, own)).over(rest))
    )


def listed_outcomes() -> list[Column]:
    """Return `outcome_items` and `outcome_events`, parallel, each pair once."""
    pairs = F.array_sort(
        F.array_distinct(
            F.transform("outcomes", lambda outcome: F.struct(outcome["item"], outcome["event"]))
        )
    )
    return [pairs[name].alias(f"outcome_{name}s") for name in ("item", "event")]


def check_outcomes(examples: DataFrame) -> None:
    """Prove on the data that outcomes are of the window of their label, and not before it.

    Args:
        examples: with `window`, `at`, `order` and `outcomes`.

    Raises:
        LeakError: one is not.
    """
    moment = F.struct("at", "order")
    strange = F.exists(
        "outcomes", lambda o: (o["window"] != F.col("window")) | (o["moment"] < moment)
    )
    found = examples.agg(F.count_if(strange)).first()[0]
    if found:
        raise LeakError(
            f"{found} examples have an outcome that is before their label or of another window"
        )
