"""Hand-made click tables, and the stages of `prepare` that tests look at one by one."""

from types import SimpleNamespace

import pytest

from recsys.config import RunConfig
from training.prepare.corpus import build_corpus
from training.prepare.events import clean_events
from training.prepare.examples import build_examples, build_training, build_users
from training.prepare.pipeline import build_sequences
from training.prepare.sequences import flat_events
from training.prepare.sources import read_tables
from training.prepare.split import split_points

COLUMNS = ("u", "i", "t", "n", "e", "s", "w", "c", "p")
FEATURES = (
    {"name": "history", "side": "query", "kind": "history", "of": "item_id", "length": 3},
    {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
)
SPLIT = {"kind": "time", "validation_from": "2024-01-20", "test_from": "2024-01-25"}


@pytest.fixture(scope="session")
def click():
    """Make a row: user, item, day of January 2024 (may be a fraction), and other columns."""

    def make(user, item, day=None, **more):
        time = None
        if day is not None:
            minutes = round((day % 1) * 24 * 60)
            time = f"2024-01-{int(day):02d} {minutes // 60:02d}:{minutes % 60:02d}:00"
        return {"u": user, "i": item, "t": time, **more}

    return make


@pytest.fixture(scope="session")
def configure():
    """Make a config from the keys of `data`; the table is the temporary view `clicks`."""

    def make(features=FEATURES, columns=None, **data):
        if not any(feature["side"] == "query" for feature in features):
            features = [*features, FEATURES[0]]
        events = data.pop("events", {"table": "clicks"})
        columns = columns or {"user": "u", "item": "i", "time": "t"}
        data = {"split": SPLIT, **data, "events": {**events, "columns": columns}}
        registry = {"model": "test"}
        return RunConfig.model_validate(
            {"name": "test", "data": data, "features": features, "registry": registry}
        )

    return make


@pytest.fixture(scope="session")
def show(spark):
    """Make rows the temporary view `clicks`."""

    def make(rows):
        schema = ", ".join(f"{name} string" for name in COLUMNS)
        tuples = [tuple(row.get(name) for name in COLUMNS) for row in rows]
        spark.createDataFrame(tuples, schema).createOrReplaceTempView("clicks")

    return make


@pytest.fixture
def stages(spark, show):
    """Run the stages up to examples, corpus and users on rows."""

    def make(rows, config):
        show(rows)
        tables = read_tables(spark, config)
        cleaned = clean_events(tables, config)
        points = split_points(config.data.split, cleaned.last_at)
        sequences = build_sequences(cleaned, tables, config, points).persist()
        events = flat_events(sequences)
        return SimpleNamespace(
            tables=tables,
            report=cleaned.report,
            points=points,
            sequences=sequences,
            events=events,
            examples=build_examples(sequences, config, tables.homes),
            training=build_training(sequences, config, tables.homes, "train"),
            recent=build_training(sequences, config, tables.homes, "validation"),
            users=build_users(sequences, config, tables.homes),
            corpus=build_corpus(events, tables.items, config.schema_, tables.homes),
        )

    return make
