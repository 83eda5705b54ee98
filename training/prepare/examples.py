"""Sequences to examples, a label each, and to training sequences, in which labels share a history.

Either way a label has the query features that are known strictly before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recsys.config import RunConfig
from recsys.schema import Feature, Schema
from training.prepare.columns import Home
from training.prepare.judged import judged_events
from training.prepare.split import SEES, STAGES
from training.prepare.values import spark_type

#: Columns of an event that its label keeps.
_OWN = ("position", "at", "order", "window", "item", "weight", "warm")


def build_examples(
    sequences: DataFrame,
    config: RunConfig,
    homes: Mapping[str, Home],
    windows: Collection[str] = tuple(SEES),
) -> DataFrame:
    """Return one row per label of these windows.

    Columns: `user`, `position`, `at`, `order`, `window`, `item` (the label), `weight`, `warm` (the
    user has training events), `f_<feature>` of query and context features, `exclusions` if the
    seen is excluded, `outcomes` where tasks need them (see `add_outcomes`), and what the leakage
    check needs: `newest` and `stage`.

    Args:
        sequences: persisted, see `collect_sequences`.
        config: the run's.
        homes: table of every feature.
        windows: train, validation, test.
    """
    schema, exclude = config.schema_, config.data.exclude_seen
    own = (*_OWN, "outcomes") if config.needs_outcomes else _OWN

    def record(event: Column) -> Column:
        view = F.get(F.col("views"), event["level"] - 1)
        known = Known(event, view, event["earlier"])
        values = [event[name].alias(name) for name in own]
        values += [known.feature(f, schema, homes).alias(f"f_{f.name}") for f in schema.query]
        if exclude:
            values.append(_exclusions(event["before"]).alias("exclusions"))
        return F.struct(*values, *known.evidence(max(lengths(schema))))

    return sequences.select("user", F.inline(F.transform(_labels(windows), record)))


def build_training(
    sequences: DataFrame, config: RunConfig, homes: Mapping[str, Home], window: str
) -> DataFrame:
    """Return the labels of a window as training sequences: one history, many labels along it.

    A history that is longer than the features list is cut into overlapping pieces: each label has
    at least half of the listed length before it, or all that there is.

    Columns: `user`; `first`, which piece of the history it is; `moments`, `stages` and
    `h_<feature>`, arrays over the events of the history, oldest first; `labels`, an array of
    structs: `known` (how many events of the history are before the label), `f_<feature>` of the
    other query features, and the columns that `build_examples` gives a label; with `model.joint`
    also `judged`, the same of judged events, with `event`.

    Args:
        sequences: persisted, see `collect_sequences`.
        config: the run's.
        homes: table of every feature.
        window: train or validation.
    """
    schema = config.schema_
    length = max(schema.history_length, 1)
    stride = max(length // 2, 1)
    others = [f for f in schema.query if f.kind != "history"]
    view = F.get("views", F.lit(SEES[window] - 1))

    def placed(event: Column, columns: Collection[str]) -> Column:
        known = Known(event, view, event["earlier"])
        piece = F.ceil(F.greatest(event["earlier"] - length, F.lit(0)) / stride).cast("int")
        values = [known.feature(f, schema, homes).alias(f"f_{f.name}") for f in others]
        own = [event[name].alias(name) for name in columns]
        first = (piece * stride).alias("first")
        return F.struct(first, (event["earlier"] - piece * stride).alias("known"), *own, *values)

    lists = {"labels": F.transform(_labels([window]), lambda e: placed(e, _OWN))}
    if config.model.joint is not None:
        own = (*_OWN, "event")
        lists["judged"] = F.transform(judged_events(window), lambda e: placed(e, own))
    every = [column.alias(name) for name, column in lists.items()]
    pieces = sequences.select("user", "past", view.alias("view"), *every)
    firsts = F.concat(*(F.col(name)["first"] for name in lists))
    pieces = pieces.withColumn("first", F.explode(F.array_distinct(firsts)))
    pieces = pieces.withColumns(
        {name: F.filter(name, lambda one: one["first"] == F.col("first")) for name in lists}
    )
    return pieces.select("user", "first", *_history(schema, list(lists)), *lists)


def _labels(windows: Collection[str]) -> Column:
    wanted = F.array(*(F.lit(window) for window in windows))
    return F.filter(
        "past", lambda event: event["is_label"] & F.array_contains(wanted, event["window"])
    )


def _history(schema: Schema, lists: Collection[str]) -> list[Column]:
    """Return arrays over the events that some event of these lists of the piece knows."""
    known = F.concat(*(F.col(name)["known"] for name in lists))
    stop = F.col("first") + F.array_max(known)
    indices = F.when(stop > F.col("first"), F.sequence(F.col("first"), stop - 1))

    def listed(value: Callable[[Column], Column]) -> Column:
        events = F.coalesce(indices, F.array().cast("array<int>"))
        return F.transform(events, lambda i: value(F.get("past", F.get("view", i))))

    names = F.array(*(F.lit(stage) for stage in STAGES))

    def values(feature: Feature) -> Column:
        name = f"f_{schema[feature.of or ''].name}"
        return listed(lambda event: F.coalesce(event[name], F.lit("")))

    return [
        listed(lambda e: F.struct(e["at"], e["order"])).alias("moments"),
        listed(lambda e: F.array_position(names, e["window"]) - 1).alias("stages"),
        *(values(feature).alias(f"h_{feature.name}") for feature in schema.histories()),
    ]


def build_users(sequences: DataFrame, config: RunConfig, homes: Mapping[str, Home]) -> DataFrame:
    """Return one row per user: `user`, its features as of the end of the data, `exclusions`."""
    schema = config.schema_
    if config.data.history_scope == "session":
        newest_first = Window.partitionBy("user").orderBy(
            F.element_at("past", -1)["position"].desc()
        )
        sequences = sequences.withColumn("nth", F.row_number().over(newest_first)).filter("nth = 1")
    known = Known(F.element_at("past", -1), F.get(F.col("views"), F.lit(2)), F.size("past"))
    values = [known.feature(f, schema, homes).alias(f.name) for f in schema.query]
    if config.data.exclude_seen:
        values.append(F.array_distinct("items").alias("exclusions"))
    return sequences.select("user", *values)


class Known:
    """What is known of a user when one event is to be predicted.

    Args:
        event: the label, or the last event.
        view: indices in `past` of the events that may be known.
        earlier: how many of them are.
    """

    def __init__(self, event: Column, view: Column, earlier: Column) -> None:
        self._event = event
        self._view = view
        self._earlier = earlier

    def feature(self, feature: Feature, schema: Schema, homes: Mapping[str, Home]) -> Column:
        """Return the value of a query or context feature."""
        if feature.of is not None:
            listed = schema[feature.of].name
            return self._latest(feature.length, lambda e: F.coalesce(e[f"f_{listed}"], F.lit("")))
        own = feature.side == "context" or homes[feature.name] == "users"
        is_user = homes[feature.name] == "role" and feature.source_column == "user"
        event = self._event if own or is_user else self._past(self._earlier - 1)
        return event[f"f_{feature.name}"].cast(spark_type(feature))

    def evidence(self, length: int) -> tuple[Column, Column]:
        """Return the time of the latest event used, and the highest stage of one."""
        moments = self._latest(length, lambda e: F.struct(e["at"], e["order"]))
        names = F.array(*(F.lit(stage) for stage in STAGES))
        stages = self._latest(length, lambda e: F.array_position(names, e["window"]) - 1)
        return F.array_max(moments).alias("newest"), F.array_max(stages).alias("stage")

    def _latest(self, length: int, value: Callable[[Column], Column]) -> Column:
        """Return an array over the `length` latest known events, oldest first.

        Element access instead of `slice`, which copies the whole array when it is interpreted.
        """
        first = F.greatest(self._earlier - length, F.lit(0))
        indices = F.when(self._earlier > 0, F.sequence(first, self._earlier - 1))
        none = F.array().cast("array<int>")
        return F.transform(F.coalesce(indices, none), lambda index: value(self._past(index)))

    def _past(self, index: Column) -> Column:
        return F.get(F.col("past"), F.get(self._view, index))


def _exclusions(before: Column) -> Column:
    earlier = F.when(before > 0, F.sequence(F.lit(0), before - 1))
    items = F.transform(earlier, lambda index: F.get(F.col("items"), index))
    return F.array_distinct(F.coalesce(items, F.array().cast("array<string>")))


def lengths(schema: Schema) -> list[int]:
    """Return how many of the latest events each query feature may be made from."""
    return [1, *(feature.length for feature in schema.histories())]
