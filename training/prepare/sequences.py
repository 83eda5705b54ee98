"""Events in order: sessions, positions, what is earlier than what, and one array per history.

The order of a user's events is by time, then by the order columns. Events that agree in both are
*peers*: none is earlier than the other, so none is in the other's history. Among peers, item and
event type decide the position, so that every run has the same one.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys.data_config import Data
from training.prepare.split import SEES


def order_events(events: DataFrame, data: Data) -> DataFrame:
    """Add the columns that depend on the order of events alone.

    `session`; `position`, counted from 0 over the user's events; `before`, how many of these are
    strictly earlier; `weight` of the event type; `seen`, whether the event would be a label if
    the user had not seen the item; `labelable`, whether it can be one.
    """
    user = Window.partitionBy("user")
    total = user.orderBy("at", "order", "item", "event", F.xxhash64(*events.columns))
    first = F.min(F.struct("at", "order")).over(Window.partitionBy("user", "item"))
    seen = F.lit(data.exclude_seen) & (first < F.struct("at", "order"))
    is_label, weight = _label(data)
    added = {
        "position": F.row_number().over(total) - 1,
        "before": F.rank().over(user.orderBy("at", "order")) - 1,
        "weight": weight,
        "seen": seen & is_label,
        "labelable": is_label & ~seen,
    }
    return _sessionise(events, data).withColumns(added)


def _sessionise(events: DataFrame, data: Data) -> DataFrame:
    if data.events.columns.session is not None:
        return events.withColumn("session", F.coalesce("session", "user"))
    if data.events.columns.time is None:
        return events.withColumn("session", F.col("user"))
    moment = Window.partitionBy("user").orderBy("at", "order")
    gap = F.col("at") - F.lag("at").over(moment)
    begins = (gap > int(data.session_gap_minutes * 60_000_000)).cast("int")
    number = F.coalesce(F.sum("begins").over(moment), F.lit(0))
    return (
        events.withColumn("begins", begins)
        .withColumn("session", number.cast("string"))
        .drop("begins")
    )


def _label(data: Data) -> tuple[Column, Column]:
    """Return whether the event type is a label, and its weight (float)."""
    if not data.event_types:
        return F.lit(True), F.lit(1.0).cast("float")
    labels = [name for name, kind in data.event_types.items() if kind.label]
    weight = F.lit(1.0)
    for name, kind in data.event_types.items():
        weight = F.when(F.col("event") == name, F.lit(kind.weight)).otherwise(weight)
    return F.col("event").isin(labels), weight.cast("float")


def add_labels(events: DataFrame, data: Data) -> DataFrame:
    """Add `earlier`, the events that the history of this one may list, `is_label` and `warm`.

    Args:
        events: ordered, with `window`, `rare`, `trains` and `level`.
        data: its `history_scope` and `min_history` decide.
    """
    scope = _scope(data)
    # Without a row frame, peers belong to the running sum: they are taken off again.
    until = Window.partitionBy(*scope).orderBy("at", "order")
    peers = Window.partitionBy(*scope, "at", "order")
    earlier = F.lit(0).cast("bigint")
    for window, level in SEES.items():
        visible = (F.col("level") <= level).cast("int")
        count = F.sum(visible).over(until) - F.sum(visible).over(peers)
        earlier = F.when(F.col("window") == window, count).otherwise(earlier)
    in_window = F.col("window").isin(*SEES) & F.col("rare").isNull()
    enough = F.col("earlier") >= data.min_history
    events = events.withColumn("earlier", earlier.cast("int"))
    warm = F.max("trains").over(Window.partitionBy("user"))
    return events.withColumns({"is_label": F.col("labelable") & in_window & enough, "warm": warm})


def collect_sequences(events: DataFrame, data: Data) -> DataFrame:
    """Return a row per user (or session): its events in order, and who may see which of them.

    Columns: `user`; `past`, an array of structs of all other columns; `views`, three arrays: the
    indices in `past` of the events of level 1, up to 2, up to 3; if the seen is excluded, `items`,
    all items of the user in order.
    """
    fields = [name for name in events.columns if name not in ("user", "session", "given")]
    fields.sort(key=lambda name: name != "position")
    past = F.array_sort(F.collect_list(F.struct(*fields)))
    # `past` stands outside of all lambdas: Spark may evaluate what is inside once per element.
    views = F.array(*(_view(level) for level in SEES.values()))
    sequences = events.groupBy(*_scope(data)).agg(past.alias("past")).withColumn("views", views)
    if data.exclude_seen:
        every = F.array_sort(F.collect_list(F.struct("position", "item")))
        users = events.groupBy("user").agg(every["item"].alias("items"))
        sequences = sequences.join(users, "user")
    return sequences


def flat_events(sequences: DataFrame) -> DataFrame:
    """Return the events of sequences, a row each, with `user`."""
    return sequences.select("user", F.inline("past"))


def _scope(data: Data) -> list[str]:
    return ["user"] if data.history_scope == "user" else ["user", "session"]


def _view(level: int) -> Column:
    marked = F.transform("past", lambda event, index: F.when(event["level"] <= level, index))
    return F.filter(marked, lambda index: index.isNotNull())
