import pytest
import tensorflow as tf
from pyspark.sql import functions as F

from training.prepare.errors import PrepareError
from training.prepare.tfrecords import (
    WindowCounts,
    write_corpus,
    write_examples,
    write_sequences,
    write_users,
)
from training.tfrecord import register

FEATURES = [
    {"name": "history", "side": "query", "kind": "history", "of": "item_id", "length": 2},
    {"name": "city", "side": "query", "kind": "category", "column": "c"},
    {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
    {"name": "price", "side": "candidate", "kind": "number", "column": "p"},
]


@pytest.fixture
def made(spark, stages, click, configure):
    register(spark)
    rows = [
        click(user, f"i{n}", day, c=None if n == 1 else "Köln", p=str(n))
        for user in ("b", "a", "é")
        for n, day in enumerate((1, 2, 3, 26))
    ]
    made = stages(rows, configure(FEATURES, exclude_seen=True, shards=2))
    made.config = configure(FEATURES, exclude_seen=True, shards=2)
    return made


def records_of(folder):
    files = sorted(str(path) for path in folder.glob("part-*.tfrecord"))
    assert files
    for raw in tf.data.TFRecordDataset(files):
        example = tf.train.Example.FromString(raw.numpy())
        yield {
            name: list(getattr(value, value.WhichOneof("kind")).value)
            if value.WhichOneof("kind")
            else []
            for name, value in example.features.feature.items()
        }


def test_examples_hold_the_fields_of_the_contract(made, tmp_path):
    count = WindowCounts("train", 9, 0, 10**15, 0, 0)
    written = write_examples(made.examples, made.config, tmp_path, count)
    assert (written.path, written.num_examples, written.num_files) == ("train", 9, 2)
    assert written.first_at.year == 1970
    records = {(r["user"][0], r["label"][0]): r for r in records_of(tmp_path / "train")}
    assert len(records) == 9
    third = records["é".encode(), b"i2"]
    assert third == {
        "user": ["é".encode()],
        "time": [1_704_240_000_000_000],
        "label": [b"i2"],
        "weight": [1.0],
        "exclusions": [b"i0", b"i1"],
        "history": [b"i0", b"i1"],
    }, "the missing city is an absent feature"
    assert records[b"a", b"i1"]["city"] == ["Köln".encode()]


def test_sequences_hold_many_labels_along_one_history(made, tmp_path):
    count = WindowCounts("train", 9, 0, 10**15, 0, 0)
    written = write_sequences(made.training, made.config, tmp_path / "train", count)
    assert (written.path, written.num_sequences, written.num_examples) == ("train", 3, 9)
    records = {r["user"][0]: r for r in records_of(tmp_path / "train")}
    day = 86_400_000_000
    assert records["é".encode()] == {
        "user": ["é".encode()],
        "history": [b"i0", b"i1"],
        "label": [b"i0", b"i1", b"i2"],
        "known": [0, 1, 2],
        "time": [1_704_067_200_000_000 + n * day for n in range(3)],
        "weight": [1.0, 1.0, 1.0],
        "city": [b"", "Köln".encode(), b""],
    }, "a missing city is an empty one; each label has the city of the event before it"


def test_a_label_too_few_is_an_error(made, tmp_path):
    with pytest.raises(PrepareError, match="expected 10 labels, found 9"):
        count = WindowCounts("train", 10, 0, 0, 0, 0)
        write_sequences(made.training, made.config, tmp_path / "train", count)


def test_without_time_the_first_order_column_is_the_time(spark, stages, click, configure, tmp_path):
    register(spark)
    rows = [click("a", f"i{n}", n="7", p=str(n), c="Köln", w="train") for n in range(3)]
    config = configure(
        FEATURES,
        columns={"user": "u", "item": "i", "order": ["n", "p"]},
        split={"kind": "given", "column": "w"},
    )
    made = stages(rows, config)
    write_examples(made.examples, config, tmp_path, WindowCounts("train", 3, 0, 0, 0, 0))
    records = list(records_of(tmp_path / "train"))
    assert sorted(len(r["history"]) for r in records) == [0, 1, 2]
    assert [r["time"] for r in records] == [[7]] * 3


def test_a_record_too_few_is_an_error(made, tmp_path):
    with pytest.raises(PrepareError, match="expected 10 records, read back 9"):
        write_examples(made.examples, made.config, tmp_path, WindowCounts("train", 10, 0, 0, 0, 0))


def test_corpus_is_one_file_by_count_then_bytes(spark, made, tmp_path):
    extra = made.corpus.filter("item = 'i0'").withColumns(
        {"item": F.lit("Z"), "count": F.lit(3).cast("bigint")}
    )
    written = write_corpus(made.corpus.unionByName(extra), made.config.schema_, tmp_path)
    assert (written.num_items, written.num_warm) == (5, 4)
    assert [p.name for p in (tmp_path / "corpus").glob("part-*")] == ["part-00000.tfrecord"]
    records = list(records_of(tmp_path / "corpus"))
    order = [(r["item"][0].decode(), r["count"][0]) for r in records]
    assert order == [("Z", 3), ("i0", 3), ("i1", 3), ("i2", 3), ("i3", 0)]
    assert records[2] == {
        "item": [b"i1"],
        "name": [b"i1"],
        "count": [3],
        "labels": [3],
        "item_id": [b"i1"],
        "price": [1.0],
    }


def test_users_are_sorted_in_each_file(spark, made, tmp_path):
    assert write_users(made.users, 1, tmp_path) == 3
    rows = spark.read.parquet(str(tmp_path / "users")).collect()
    assert [row["user"] for row in rows] == ["a", "b", "é"]
    assert rows[0]["history"] == ["i2", "i3"]
    assert rows[0]["exclusions"] == ["i0", "i1", "i2", "i3"]
