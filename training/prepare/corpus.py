"""All candidates: their training counts, readable names and features."""

from __future__ import annotations

from collections.abc import Mapping

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recsys.schema import Schema
from training.prepare.columns import Home
from training.prepare.values import spark_type


def build_corpus(
    events: DataFrame, items: DataFrame | None, schema: Schema, homes: Mapping[str, Home]
) -> DataFrame:
    """Return one row per item of the cleaned events and of the item table.

    Columns: `item`, `name`, `count` (training events), `labels`, `validation_labels`,
    `test_labels` and `f_<feature>` of the candidate features. What is read from events is the
    value of the item's first event, of the first training event if there is one: of an item that
    is trained on, nothing after the split is used.

    Args:
        events: flat, with `trains`, `is_label` and `window`.
        items: the item table, if there is one.
        schema: of the run.
        homes: table of every feature.
    """
    own = [f for f in schema.candidate if homes[f.name] != "items"]
    labels = {"train": "labels", "validation": "validation_labels", "test": "test_labels"}
    corpus = events.groupBy("item").agg(
        F.count_if("trains").alias("count"),
        *(
            F.count_if(F.col("is_label") & (F.col("window") == w)).alias(n)
            for w, n in labels.items()
        ),
        _first("name").alias("event_name"),
        *(_first(f"f_{f.name}").alias(f"f_{f.name}") for f in own),
    )
    name = F.col("event_name")
    if items is not None:
        corpus = corpus.join(items, "item", "full_outer")
        name = F.coalesce("name", name)
        # The id of an item that has no event is known all the same.
        for feature in own:
            if feature.source_column == "item":
                corpus = corpus.withColumn(f"f_{feature.name}", F.col("item"))
    return corpus.select(
        "item",
        F.coalesce(name, "item").alias("name"),
        *(F.coalesce(n, F.lit(0).cast("bigint")).alias(n) for n in ("count", *labels.values())),
        *(F.col(f"f_{f.name}").cast(spark_type(f)).alias(f"f_{f.name}") for f in schema.candidate),
    )


def _first(name: str) -> Column:
    """Return the value in the item's first event that has one, training events before others."""
    value = F.col(name)
    later, none = (~F.col("trains")).alias("later"), value.isNull().alias("none")
    return F.min(F.struct(later, none, "at", "order", value.alias("value")))["value"]
