import pytest

from recsys.artifacts import ArtifactError
from serving_export.unchanged import HASH, KEPT, last_result, with_inputs, with_last

pytestmark = pytest.mark.spark

VERSION = {"name": "shop", "version": "3", "digest": "abc"}
TYPES = "user string, country string, page string, seen array<string>, past array<string>"


def test_inputs_that_differ_have_another_hash(spark):
    """Among them those that Spark's hash of columns takes for the same."""
    rows = [
        ("u", "dk", None, ["a", "b"], ["c"]),
        ("u", None, "dk", ["a", "b"], ["c"]),
        ("u", "dk", "", ["a", "b"], ["c"]),
        ("u", "dk", None, ["a"], ["b", "c"]),
        ("u", "dk", None, ["a", "b", None], ["c"]),
        ("u", "dk", None, ["b", "a"], ["c"]),
    ]
    table = spark.createDataFrame(rows, TYPES)
    hashed = [row[HASH] for row in with_inputs(table, VERSION, 10).collect()]
    assert len(set(hashed)) == len(rows)
    other_order = table.select("past", "seen", "user", "page", "country")
    assert [row[HASH] for row in with_inputs(other_order, VERSION, 10).collect()] == hashed
    renamed = table.replace("u", "v", ["user"])
    assert [row[HASH] for row in with_inputs(renamed, VERSION, 10).collect()] == hashed
    for version, k in (
        (VERSION, 11),
        (VERSION | {"digest": "d"}, 10),
        (VERSION | {"version": "4"}, 10),
    ):
        others = {row[HASH] for row in with_inputs(table, version, k).collect()}
        assert not others & set(hashed)


def test_an_answer_is_kept_where_user_and_inputs_are_the_same(spark):
    rows = [(1, "dk", 5), (2, "dk", 5), (3, "de", 7), (None, "dk", 5)]
    users = spark.createDataFrame(rows, "user int, items string, _inputs bigint")
    last = spark.createDataFrame(
        [("1", ["a"], [0.5], 5), ("1", ["a"], [0.5], 5), ("2", ["b"], [0.4], 6), ("4", [], [], 7)],
        "user string, items array<string>, scores array<float>, inputs bigint",
    )
    found = with_last(users, last)
    assert found.columns == ["user", "items", HASH, KEPT]
    kept = {row["user"]: row[KEPT] and tuple(row[KEPT]["items"]) for row in found.collect()}
    assert kept == {1: ("a",), 2: None, 3: None, None: None}
    assert found.count() == 4


def test_a_last_result_that_is_not_there_or_no_result(spark, tmp_path, caplog):
    assert last_result(spark, tmp_path / "none") is None
    assert last_result(spark, "no_such_table") is None
    old = spark.createDataFrame(
        [("1", ["a"], [0.5])], "user string, items array<string>, scores array<float>"
    )
    old.write.parquet(str(tmp_path / "old"))
    with caplog.at_level("INFO"):
        assert last_result(spark, tmp_path / "old") is None
    assert "does not tell what it was made from: all users are scored" in caplog.text
    old.drop("scores").write.parquet(str(tmp_path / "strange"))
    with pytest.raises(ArtifactError, match=r"holds no recommendations: it has no scores"):
        last_result(spark, tmp_path / "strange")
