"""The steps of `prepare` in their order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recsys.artifacts import PreparedData
from recsys.config import RunConfig
from training.prepare.corpus import build_corpus
from training.prepare.errors import PrepareError
from training.prepare.events import Cleaned, clean_events
from training.prepare.examples import build_examples, build_training, build_users
from training.prepare.held_out import (
    askable,
    build_queries,
    check_later,
    count_queries,
    report_held_out,
)
from training.prepare.impressions import (
    build_requests,
    report_shown,
    shown_rows,
    write_impressions,
)
from training.prepare.judged import add_judged, count_judged, last_judged
from training.prepare.outcomes import add_outcomes, check_outcomes
from training.prepare.sequences import add_labels, collect_sequences, flat_events, order_events
from training.prepare.sources import Tables, attach_features, read_tables
from training.prepare.split import (
    SEES,
    SplitPoints,
    add_levels,
    assign_windows,
    check_no_leak,
    mark_rare,
    split_points,
)
from training.prepare.tfrecords import (
    WindowCounts,
    write_corpus,
    write_examples,
    write_queries,
    write_sequences,
    write_users,
)
from training.prepare.values import to_datetime
from training.prepare.vocabulary import number_statistics, read_vocabularies, write_vocabularies

logger = logging.getLogger(__name__)


def run_pipeline(config: RunConfig, spark: SparkSession, directory: Path) -> PreparedData:
    """Read, clean, split, build, prove, write; see `prepare`."""
    schema, data = config.schema_, config.data
    with ExitStack() as stack:
        tables = read_tables(spark, config)
        cleaned = clean_events(tables, config)
        stack.callback(cleaned.cached.unpersist)
        points = split_points(data.split, cleaned.last_at)
        sequences = _persisted(build_sequences(cleaned, tables, config, points), stack)
        events = flat_events(sequences)
        report = cleaned.report | _count_set_aside(events, config)
        judged = ("validation", "test")
        examples = _persisted(build_examples(sequences, config, tables.homes, judged), stack)
        training = _persisted(build_training(sequences, config, tables.homes, "train"), stack)
        recent = _persisted(build_training(sequences, config, tables.homes, "validation"), stack)
        labels = training.select("user", F.inline("labels"))
        corpus = _persisted(build_corpus(events, tables.items, schema, tables.homes), stack)
        counts = _count_windows(examples, labels, corpus)
        users = build_users(sequences, config, tables.homes)
        queries = None
        if data.held_out is not None:
            every = _persisted(build_queries(events, users, tables, config), stack)
            queries = askable(every, config)
            report |= report_held_out(every, corpus, tables, config)
            check_later(every)
            counts |= count_queries(queries, corpus)
        impressions = None
        if data.impressions is not None and points is not None:
            rows = _persisted(shown_rows(tables, config), stack)
            report |= report_shown(rows, corpus, config)
            asked = build_requests(rows, sequences, tables, config, points)
            impressions = write_impressions(_persisted(asked, stack), config, directory)
        _require_examples(counts, config, cleaned, points)
        vocabularies = write_vocabularies(events, schema, directory)
        lines = read_vocabularies(spark, directory)
        learned = training.unionByName(recent)
        check_no_leak(events, examples, learned, lines, data.split, points)
        if config.needs_outcomes:
            check_outcomes(examples)
        return PreparedData(
            directory=directory,
            features=schema,
            fingerprint=schema.fingerprint,
            train=write_sequences(training, config, directory / "train", counts["train"]),
            recent=write_sequences(recent, config, directory / "recent", counts["validation"]),
            validation=write_examples(examples, config, directory, counts["validation"]),
            test=write_examples(examples, config, directory, counts["test"])
            if queries is None
            else write_queries(queries, config, directory, counts["test"]),
            corpus=write_corpus(corpus, schema, directory),
            users="users",
            num_users=write_users(users, data.shards, directory),
            vocabularies=vocabularies,
            statistics=number_statistics(labels, corpus, schema),
            cleaning=report,
            sources=tables.versions_with(report),
            exclude_seen=data.exclude_seen,
            outcomes=config.needs_outcomes,
            impressions=impressions,
            judged=count_judged({"train": training, "recent": recent}, config.model.joint),
            judged_until=last_judged(training, config),
        )


def _persisted(frame: DataFrame, stack: ExitStack) -> DataFrame:
    kept = frame.persist(StorageLevel.MEMORY_AND_DISK)
    stack.callback(kept.unpersist)
    return kept


def build_sequences(
    cleaned: Cleaned, tables: Tables, config: RunConfig, points: SplitPoints | None
) -> DataFrame:
    """Bring events into order, windows and levels, and collect them by user or session.

    Args:
        cleaned: the events.
        tables: features of users and items are taken from them.
        config: the run's.
        points: where time splits, else None.
    """
    data = config.data
    ordered = order_events(attach_features(cleaned.events, tables, config.schema_), data)
    windowed = assign_windows(ordered, data, points)
    levels = add_levels(mark_rare(windowed, data))
    if config.needs_outcomes:
        levels = add_outcomes(levels)
    labelled = add_labels(levels, data)
    if config.model.joint is not None:
        labelled = add_judged(labelled, data)
    return collect_sequences(labelled, data)


def _count_set_aside(events: DataFrame, config: RunConfig) -> dict[str, int]:
    """Count kept events that do not train or are no labels; they are part of `kept`."""
    cleaning = config.data.cleaning
    counts = {}
    if cleaning.min_item_events > 1:
        counts["training events of rare items"] = F.count_if(F.col("rare") == "item")
    if cleaning.min_user_events > 1:
        counts["training events of rare users"] = F.count_if(F.col("rare") == "user")
    if config.data.exclude_seen:
        counts["labels seen before"] = F.count_if("seen")
    if not counts:
        return {}
    row = events.agg(*counts.values()).first()
    for reason, count in zip(counts, row, strict=True):
        logger.info("events: %s: %d", reason, count)
    return dict(zip(counts, row, strict=True))


def _count_windows(
    examples: DataFrame, labels: DataFrame, corpus: DataFrame
) -> dict[str, WindowCounts]:
    """Return the counts of train, validation and test; of an empty window, none."""
    cold = F.count_distinct(F.when(~F.col("warm"), F.col("user")))
    columns = ("window", "at", "user", "warm")
    both = examples.select(*columns).unionByName(labels.select(*columns))
    rows = both.groupBy("window").agg(
        F.count(F.lit(1)).alias("num_examples"),
        F.min("at").alias("first_at"),
        F.max("at").alias("last_at"),
        cold.alias("num_cold_users"),
    )
    counted = {"train": "labels", "validation": "validation_labels", "test": "test_labels"}
    items = corpus.filter("count = 0").agg(*(F.count_if(F.col(n) > 0) for n in counted.values()))
    cold_items = dict(zip(counted, items.first(), strict=True))
    return {
        row["window"]: WindowCounts(num_cold_items=cold_items[row["window"]], **row.asDict())
        for row in rows.collect()
    }


def _require_examples(
    counts: Mapping[str, WindowCounts],
    config: RunConfig,
    cleaned: Cleaned,
    points: SplitPoints | None,
) -> None:
    """Refuse a split that leaves a window without examples.

    Raises:
        PrepareError: naming the window, what there is, and the keys that decide it.
    """
    empty = [window for window in SEES if window not in counts]
    if not empty:
        return
    data = config.data
    told = {
        "time": "see data.split.validation_from (or validation_days) and test_from (or test_days)",
        "leave_last_out": "data.split.kind=leave_last_out needs users with 3 events or more",
        "given": "see the values of the column that data.split.column names",
        "held_out": "data.held_out has the test labels, and validation, unless data.split has "
        "validation_from or validation_days, needs users with 2 events or more",
    }[data.split.kind]
    if points is not None:
        told = (
            f"the events span {to_datetime(cleaned.first_at)} to {to_datetime(cleaned.last_at)}, "
            f"validation begins {to_datetime(points.validation_from)}, test begins "
            f"{to_datetime(points.test_from)}: {told}"
        )
    raise PrepareError(
        f"no {' and no '.join(empty)} examples: {told}; a label needs "
        f"data.min_history={data.min_history} earlier events of its {data.history_scope}"
    )
