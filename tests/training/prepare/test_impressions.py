"""Shown lists in a second table: from `prepare` on small tables to records, counts and manifest."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from pyspark.sql import functions as F

from recsys.artifacts import PreparedData
from recsys.config import ConfigError, RunConfig
from training.prepare import prepare
from training.prepare.columns import Columns, verify
from training.prepare.errors import LeakError, PrepareError
from training.prepare.impressions import (
    build_requests,
    report_shown,
    shown_rows,
    write_impressions,
)
from training.tfrecord import register

FEATURES = [
    {"name": "history", "side": "query", "kind": "history", "of": "item_id", "length": 3},
    {"name": "user_id", "side": "query", "kind": "id", "column": "user"},
    {"name": "asked_at", "side": "context", "kind": "time", "column": "time"},
    {"name": "device", "side": "context", "kind": "category", "column": "c"},
    {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
    {"name": "price", "side": "candidate", "kind": "number", "column": "p"},
]
COLUMNS = {
    "request": "r", "user": "who", "item": "what", "time": "t", "clicked": "y", "position": "n",
    "values": {"price": "p"},
}  # fmt: skip
SHOWN_COLUMNS = ("r", "who", "what", "t", "y", "n", "p")
#: Request, user, item, moment, clicked, position, device, price; validation is from the 20th, test from 25th.
SHOWN = [
    ("1", "a", "v", "2024-01-05 00:00:00", "1", "1", "phone", "7"),
    ("1", "a", "w", "2024-01-05 00:00:00", "0", "2", "phone", "5"),
    # Shown again further down, and clicked there; the click is an event of the same moment.
    ("2", "a", "w", "2024-01-21 00:00:00", "0", "1", "desk", "5"),
    ("2", "a", "x", "2024-01-21 00:01:00", "0", "2", "desk", None),
    ("2", "a", "w", "2024-01-21 00:02:00", "1", "3", "desk", "4"),
    ("2", "a", "gone", "2024-01-21 00:00:00", "0", "4", "desk", "9"),
    ("3", "b", "v", "2024-01-22 00:00:00", "0", "1", None, "7"),
    ("3", "b", "x", "2024-01-22 00:00:00", "1", "2", None, "6"),
    # The same id for another user is another list.
    ("3", "a", "y", "2024-01-26 00:00:00", "1", "1", "phone", "8"),
    ("4", "new", "y", "2024-01-27 00:00:00", "0", "5", "phone", "8"),
    ("5", None, "y", "2024-01-27 00:00:00", "0", "1", "phone", "8"),
    ("5", "b", "y", "some day", "0", "1", "phone", "8"),
]


@pytest.fixture
def clicks(click):
    days = {"v": 5, "w": 6, "x": 7, "y": 8}
    rows = [click("a", item, day, c="phone", p=str(day)) for item, day in days.items()]
    rows += [click("b", item, day, c="desk", p=str(day)) for item, day in days.items()]
    rows += [click("a", "w", 21, c="desk"), click("a", "x", 23, c="desk")]
    return [*rows, click("b", "v", 23, c="desk"), click("a", "v", 26, c="phone")]


@pytest.fixture
def shown(spark):
    """Make rows the temporary view `shown`."""

    def make(rows):
        register(spark)
        schema = ", ".join(
            f"{name} string" for name in ("r", "who", "what", "t", "y", "n", "c", "p")
        )
        spark.createDataFrame(rows, schema).createOrReplaceTempView("shown")

    return make


@pytest.fixture
def config(configure):
    plain = configure(FEATURES).model_dump()
    impressions = {"table": "shown", "columns": COLUMNS}
    plain["data"] |= {"impressions": impressions, "shards": 1}
    return RunConfig.model_validate(plain | {"ranking": {}})


def records_of(data, split):
    for raw in tf.data.TFRecordDataset(data.files(split)):
        example = tf.train.Example.FromString(raw.numpy())
        yield {
            name: [v.decode() if isinstance(v, bytes) else v for v in value]
            for name, feature in example.features.feature.items()
            for value in [getattr(feature, feature.WhichOneof("kind") or "bytes_list").value]
        }


def test_a_shown_list_is_asked_with_what_was_known_before_it(
    spark, show, clicks, shown, config, tmp_path
):
    show(clicks)
    shown(SHOWN)
    data = prepare(config, spark, tmp_path / "data")
    micros = 1_705_795_200_000_000
    (validation_a, validation_b) = sorted(
        records_of(data, data.impressions.validation), key=lambda record: record["user"]
    )
    # As of where it came first, whatever the item table says by now.
    np.testing.assert_equal(validation_a.pop("as_shown_price"), [5.0, np.nan, 9.0])
    # No event of its own moment, or later, is in its history.
    assert validation_a == {
        "user": ["a"], "time": [micros], "label": ["w"], "shown_items": ["w", "x", "gone"],
        "shown_positions": [1, 2, 4], "history": ["w", "x", "y"], "user_id": ["a"],
        "asked_at": [micros], "device": ["desk"],
    }  # fmt: skip
    assert validation_b["label"] == ["x"]
    assert "device" not in validation_b
    test = {record["user"][0]: record for record in records_of(data, data.impressions.test)}
    assert set(test) == {"a", "new"}
    assert test["a"]["history"] == ["y", "w", "x"]
    assert (test["new"]["history"], test["new"]["user_id"]) == ([], ["new"])
    assert (test["new"]["shown_positions"], test["new"]["label"]) == ([5], [])
    counts = data.corpus.model_copy(update={"path": data.impressions.counts})
    times = {r["item"][0]: (r["shown"], r["clicked"]) for r in records_of(data, counts)}
    # Nothing of the test window is counted.
    assert times == {
        "v": ([1, 1], [1, 0]), "w": ([1, 1], [0, 1]), "x": ([0, 2], [0, 1]), "gone": ([0, 1], [0, 0]),
    }  # fmt: skip
    assert {k: n for k, n in data.cleaning.items() if k.startswith("impressions")} == {
        "impressions: rows read": 12,
        "impressions: impossible time": 1,
        "impressions: null user": 1,
        "impressions: items of no candidate": 1,
    }
    assert data.sources["impressions"].num_rows == 12
    assert data.impressions.validation.num_labels == 2
    assert (data.impressions.longest, data.impressions.positions) == (3, True)
    assert data.impressions.values == ("price",)
    assert data.impressions.test.num_cold_users == 1
    assert PreparedData.load(data.directory).impressions == data.impressions


def test_what_cannot_be_used_is_refused(spark, stages, clicks, shown, config, tmp_path):
    shown([row for row in SHOWN if row[0] != "2"])
    made = stages(clicks, config)
    schema = spark.table("shown").schema
    wrong = [
        (4, "maybe", r"columns\.clicked: expected 1 or 0.*column 'y', but 1 rows.*such as 'maybe'"),
        (5, "0", r"columns\.position: expected whole numbers from 1.*such as '0'"),
        (
            7,
            "dear",
            r"columns\.values\.price: expected numbers in column 'p', but 1.*such as 'dear'",
        ),
        (0, None, r"no row is left: null request: 1"),
    ]
    for column, value, expected in wrong:
        row = list(SHOWN[0])
        row[column] = value
        one = spark.createDataFrame([tuple(row)], schema)
        tables = dataclasses.replace(made.tables, impressions=one)
        with pytest.raises(PrepareError, match=expected):
            report_shown(shown_rows(tables, config), made.corpus, config)
    rows = shown_rows(made.tables, config).withColumn("clicked", F.lit(0))
    requests = build_requests(rows, made.sequences, made.tables, config, made.points).persist()
    with pytest.raises(PrepareError, match="no list of the validation window has a clicked item"):
        write_impressions(requests, config, tmp_path)
    late = requests.withColumn("at", F.lit(0).cast("bigint"))
    with pytest.raises(LeakError, match="requests have an event in their history that is not"):
        write_impressions(late, config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_context_of_a_request_must_stand_in_its_own_table(config):
    known = {
        "events": Columns(("u", "i", "t", "c", "p"), "clicks"),
        "impressions": Columns(SHOWN_COLUMNS, "shown"),
    }
    with pytest.raises(ConfigError, match=r"features\.3\.column: expected a column 'c' in shown"):
        verify(config, known)
    whole = known | {"impressions": Columns((*SHOWN_COLUMNS, "c"), "shown")}
    verify(config, whole)
    with pytest.raises(ConfigError, match=r"impressions\.columns\.values\.price: .*'p' in shown"):
        verify(config, known | {"impressions": Columns((*SHOWN_COLUMNS[:-1], "c"), "shown")})
