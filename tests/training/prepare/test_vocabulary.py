import pytest

from recsys.schema import Schema
from training.prepare.vocabulary import number_statistics, read_vocabularies, write_vocabularies


def schema_of(**rule):
    return Schema.model_validate(
        {
            "features": [
                {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
                {"name": "price", "side": "candidate", "kind": "number"},
                {"name": "city", "side": "query", "kind": "category", "vocabulary": rule},
                {"name": "age", "side": "query", "kind": "number"},
            ]
        }
    )


@pytest.fixture
def events(spark):
    cities = ["b", "b", "a", "a", "é", "Z", None, "c\nd", "x\u2028y", "later"]
    rows = [(f"i{k % 2}", city, city != "later") for k, city in enumerate(cities)]
    return spark.createDataFrame(rows, "f_item_id string, f_city string, trains boolean")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, ["a", "b", "Z", "é"]),
        ({"min_count": 2}, ["a", "b"]),
        ({"max_size": 3}, ["a", "b", "Z"]),
    ],
)
def test_values_by_count_then_bytes(events, tmp_path, rule, expected):
    files = write_vocabularies(events, schema_of(**rule, oov=7), tmp_path)
    text = (tmp_path / "vocabularies" / "city.txt").read_text("utf-8")
    assert text == "".join(f"{value}\n" for value in expected)
    assert (files["city"].size, files["city"].oov) == (len(expected), 7)
    assert (tmp_path / files["item_id"].path).read_text() == "i0\ni1\n"


def test_lines_are_read_back_by_feature(spark, events, tmp_path):
    write_vocabularies(events, schema_of(), tmp_path)
    found = sorted(tuple(row) for row in read_vocabularies(spark, tmp_path).collect())
    assert found == [
        *(("city", value) for value in ("Z", "a", "b", "é")),
        ("item_id", "i0"),
        ("item_id", "i1"),
    ]


def test_statistics_are_of_training(spark):
    labels = spark.createDataFrame([(1.0,), (3.0,), (None,)], "f_age float")
    corpus = spark.createDataFrame([(1, 5.0), (2, 5.0), (0, 70.0)], "count bigint, f_price float")
    found = number_statistics(labels, corpus, schema_of())
    assert (found["age"].mean, found["age"].std) == (2.0, 1.0)
    # All prices are equal: a deviation of 0 would divide by nothing.
    assert (found["price"].mean, found["price"].std) == (5.0, 1.0)


def test_statistics_of_nothing(spark):
    labels = spark.createDataFrame([], "f_age float")
    corpus = spark.createDataFrame([], "count bigint, f_price float")
    found = number_statistics(labels, corpus, schema_of())
    assert (found["age"].mean, found["age"].std) == (0.0, 1.0)
