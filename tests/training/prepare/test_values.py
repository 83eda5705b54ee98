from datetime import UTC, datetime, timedelta, timezone

import pytest

from recsys.config import ConfigError
from recsys.schema import Feature
from training.prepare.values import (
    column,
    feature_value,
    identifier,
    microseconds,
    not_a_number,
    number,
    to_datetime,
    to_microseconds,
    vector,
    wrong_value,
)

SECOND = 1_000_000
NOON = 1_704_110_400 * SECOND  # 2024-01-01 12:00 UTC


def values_of(frame, expression):
    return [row[0] for row in frame.select(expression).collect()]


@pytest.mark.parametrize(
    ("dtype", "raw", "expected"),
    [
        (
            "string",
            ["007", " ", "", None, "Ünï 鞋子", "1.0"],
            ["007", None, None, None, "Ünï 鞋子", "1.0"],
        ),
        ("bigint", [12345678901234567, -1, None], ["12345678901234567", "-1", None]),
        ("double", [17850.0, 1.5, float("nan"), 1e15], ["17850", "1.5", None, "1000000000000000"]),
    ],
)
def test_identifiers(spark, dtype, raw, expected):
    frame = spark.createDataFrame([(value,) for value in raw], f"id {dtype}")
    assert values_of(frame, identifier(frame, "id", "key")) == expected


def test_identifier_of_a_decimal(spark):
    frame = spark.sql("select cast(x as decimal(9,2)) as id from values (12.00), (12.50) as t(x)")
    assert values_of(frame, identifier(frame, "id", "key")) == ["12", "12.50"]


def test_identifier_refuses_lists(spark):
    frame = spark.sql("select array('a') as id")
    with pytest.raises(ConfigError, match="key: expected strings or integers in column 'id'"):
        identifier(frame, "id", "key")


def test_odd_column_names(spark):
    frame = spark.createDataFrame([("1",)], ["a`b. (€) c"])
    assert values_of(frame, column("a`b. (€) c")) == ["1"]


def test_numbers(spark):
    frame = spark.createDataFrame(
        [("1.5",), ("x",), ("",), ("NaN",), (None,), ("inf",)], "p string"
    )
    assert values_of(frame, number("p")) == [1.5, None, None, None, None, None]
    assert values_of(frame, not_a_number("p")) == [None, "x", None, None, None, "inf"]


@pytest.mark.parametrize(
    ("time_format", "raw", "expected"),
    [
        ("iso", "2024-01-01 12:00:00", NOON),
        ("iso", "2024-01-01T12:00:00.000001Z", NOON + 1),
        ("iso", "2024-01-01T20:00:00+08:00", NOON),
        ("iso", "2024-13-01", None),
        ("epoch_seconds", "1704110400", NOON),
        ("epoch_seconds", "1704110400.000001", NOON + 1),
        ("epoch_seconds", "soon", None),
        ("epoch_seconds", "99999999999999999", None),
        ("epoch_milliseconds", "1704110400001", NOON + 1000),
        ("dd.MM.yyyy HH:mm", "01.01.2024 12:00", NOON),
        ("dd.MM.yyyy HH:mm", "2024-01-01 12:00", None),
    ],
)
def test_microseconds(spark, time_format, raw, expected):
    frame = spark.createDataFrame([(raw,)], "t string")
    assert values_of(frame, microseconds(frame, "t", time_format)) == [expected]


def test_microseconds_of_typed_columns(spark):
    frame = spark.sql(
        "select timestamp'2024-01-01 12:00:00' as a, date'2024-01-01' as b, "
        "timestamp_ntz'2024-01-01 12:00:00' as c, 1704110400L as d"
    )
    found = [values_of(frame, microseconds(frame, n, "iso"))[0] for n in "abc"]
    assert found == [NOON, NOON - 12 * 3600 * SECOND, NOON]
    assert values_of(frame, microseconds(frame, "d", "epoch_seconds")) == [NOON]


def test_datetimes_round_trip():
    assert to_microseconds(datetime(2024, 1, 1, 12)) == NOON
    assert to_microseconds(datetime(2024, 1, 1, 20, tzinfo=timezone(timedelta(hours=8)))) == NOON
    assert to_datetime(NOON + 1) == datetime(2024, 1, 1, 12, 0, 0, 1, tzinfo=UTC)
    assert to_datetime(-1) == datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)


VECTOR = Feature(name="v", side="candidate", kind="vector", dim=2)


@pytest.mark.parametrize("element", ["double", "float", "int", "decimal(6,2)"])
def test_vectors_of_any_number_type(spark, element):
    frame = spark.sql(
        f"select cast(v as array<{element}>) v from values (array(1, 2)), (null) t(v)"
    )
    assert values_of(frame, feature_value(frame, VECTOR, "key", "iso")) == [[1.0, 2.0], None]
    assert frame.select(vector(frame, "v", "key")).dtypes[0][1] == "array<float>"


@pytest.mark.parametrize("value", ["'[1, 2]'", "array('1')", "1.5", "map('a', 1)"])
def test_what_is_no_array_of_numbers_is_refused(spark, value):
    frame = spark.sql(f"select {value} as v")
    with pytest.raises(ConfigError, match=r"key: expected arrays of numbers in column 'v', found"):
        vector(frame, "v", "key")


def test_vectors_of_another_length_and_broken_ones_are_told(spark):
    frame = spark.sql(
        "select * from values ('a', array(1D, 2D)), ('b', array(1D)), ('c', array()), ('d', null), "
        "('e', array(1D, null)), ('f', array(double('nan'), 1D)), ('g', array(1D, 1e300)) t(who, v)"
    )
    broken = "null, NaN or infinity among them"
    found = values_of(frame, wrong_value(VECTOR, column("who")))
    assert found == [
        None, "b: 1 numbers", "c: 0 numbers", None, f"e: {broken}", f"f: {broken}", f"g: {broken}",
    ]  # fmt: skip


def test_other_kinds_take_any_value():
    for kind in ("text", "category", "time"):
        feature = Feature.model_validate({"name": "x", "side": "query", "kind": kind})
        assert wrong_value(feature, column("who")) is None
