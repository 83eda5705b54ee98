"""Events that a ranking head learns from: each of the types of `data.event_types`, label or not.

They lie along the histories of the training sequences beside the labels of retrieval, which stay
what they are. A disliked item is nothing to retrieve, but it says what liked ones are told from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys.config import RunConfig
from recsys.data_config import Data
from recsys.judged import missing_judgements
from recsys.model_config import Joint
from training.prepare.errors import PrepareError
from training.prepare.split import SEES
from training.prepare.values import to_datetime

logger = logging.getLogger(__name__)


def add_judged(events: DataFrame, data: Data) -> DataFrame:
    """Add `judged`, whether a ranking head learns of this event.

    Its item and user must be no rarer than those of a label, and its history as long. Where the
    seen is never recommended, nobody is asked about it either: the first event of a user with an
    item alone is judged.

    Args:
        events: with `earlier`, see `add_labels`.
        data: its `event_types` are those that are judged.
    """
    judged = F.col("event").isin(list(data.event_types)) & F.col("window").isin(*SEES)
    judged &= F.col("rare").isNull() & (F.col("earlier") >= data.min_history)
    if data.exclude_seen:
        moment = F.struct("at", "order")
        judged &= F.min(moment).over(Window.partitionBy("user", "item")) == moment
    return events.withColumn("judged", F.coalesce(judged, F.lit(False)))


def judged_events(window: str) -> Column:
    """Return the judged events of a window, an array within `past`."""
    return F.filter("past", lambda event: event["judged"] & (event["window"] == window))


def count_judged(splits: Mapping[str, DataFrame], joint: Joint | None) -> dict[str, dict[str, int]]:
    """Count the judged events by split and type.

    Args:
        splits: training sequences, see `build_training`.
        joint: needs events of both kinds in each of them; without it there are none.

    Raises:
        PrepareError: a split has no event that is positive, or none that is not.
    """
    counts: dict[str, dict[str, int]] = {}
    if joint is None:
        return counts
    for name, training in splits.items():
        found = training.select(F.inline("judged")).groupBy("event").count().orderBy("event")
        counts[name] = {row["event"]: row["count"] for row in found.collect()}
        logger.info("%s: judged events %s", name, counts[name])
    missing = missing_judgements(counts, joint.positive)
    if missing:
        raise PrepareError(f"{missing}: change model.joint.positive or data.split")
    return counts


def last_judged(training: DataFrame, config: RunConfig) -> datetime | None:
    """When the last judged event of training sequences was; None without any, or without time."""
    if config.model.joint is None or config.data.events.columns.time is None:
        return None
    last = training.agg(F.max(F.array_max(F.col("judged")["at"]))).first()[0]
    return None if last is None else to_datetime(last)
