import pytest
import tensorflow as tf
from pyspark.sql import functions as F

from recsys.ranking_config import Ranking
from training.prepare.errors import LeakError
from training.prepare.outcomes import check_outcomes
from training.prepare.tfrecords import WindowCounts, write_examples
from training.tfrecord import register

FEATURES = [
    {"name": "history", "side": "query", "kind": "history", "of": "item_id", "length": 3},
    {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
]
MINUTE = 1 / (24 * 60)


@pytest.fixture
def config(configure):
    columns = {"user": "u", "item": "i", "time": "t", "event": "e"}
    types = {"view": {"label": False}, "cart": {}, "buy": {}}
    made = configure(FEATURES, columns, event_types=types, shards=1)
    ranking = Ranking(tasks={"buy": 1.0, "view": 0.1})
    return made.model_copy(update={"ranking": ranking})


@pytest.fixture
def made(stages, click, config):
    """Validation is from the 20th, test from the 25th."""
    late = 25 - 2 * MINUTE
    rows = [
        click("a", "old", 1, e="buy"),
        click("a", "x", 20, e="cart"),
        click("a", "y", 20, e="cart"),
        click("a", "x", 20 + 5 * MINUTE, e="buy"),
        click("a", "x", 20 + 6 * MINUTE, e="buy"),
        click("a", "y", 20 + 9 * MINUTE, e="view"),
        # Another session.
        click("a", "y", 22, e="buy"),
        # One session over the end of validation.
        click("a", "z", late, e="cart"),
        click("a", "z", late + 4 * MINUTE, e="buy"),
    ]
    return stages(rows, config)


def test_what_followed_ends_with_session_and_window(made):
    rows = made.examples.filter("window != 'train'").orderBy("position").collect()
    found = [
        (row["window"], row["item"], [(o["item"], o["event"]) for o in row["outcomes"]])
        for row in rows
    ]
    rest = [("x", "buy"), ("x", "buy"), ("y", "view")]
    peers = [("x", "cart"), ("y", "cart")]
    # Peers, which are in no history of each other, follow each other.
    assert [(w, i, sorted(o)) for w, i, o in found] == [
        ("validation", "x", sorted(peers + rest)),
        ("validation", "y", sorted(peers + rest)),
        ("validation", "x", rest),
        ("validation", "x", rest[1:]),
        ("validation", "y", [("y", "buy")]),
        ("validation", "z", [("z", "cart")]),
        ("test", "z", [("z", "buy")]),
    ]
    assert {row["outcomes"] for row in made.examples.filter("window = 'train'").collect()} == {None}
    check_outcomes(made.examples)


def test_a_planted_leak_is_refused(made):
    early = F.struct(F.lit(0).cast("bigint").alias("at"), F.col("order").alias("order"))
    validation = made.examples.filter("window = 'validation'")
    for field, value in (("moment", early), ("window", F.lit("test"))):
        planted = F.get("outcomes", F.lit(0)).withField(field, value)
        leaking = validation.withColumn("outcomes", F.array_append("outcomes", planted))
        with pytest.raises(LeakError, match=r"6 examples have an outcome that is before"):
            check_outcomes(leaking)


def test_records_list_each_pair_once(spark, made, config, tmp_path):
    register(spark)
    count = WindowCounts("validation", 6, 0, 10**15, 0, 0)
    write_examples(made.examples, config, tmp_path, count)
    (file,) = (tmp_path / "validation").glob("part-*.tfrecord")
    pairs = []
    for raw in tf.data.TFRecordDataset(str(file)):
        features = tf.train.Example.FromString(raw.numpy()).features.feature
        items, events = (features[f"outcome_{n}s"].bytes_list.value for n in ("item", "event"))
        pairs.append(list(zip(items, events, strict=True)))
    assert [(b"x", b"buy"), (b"y", b"view")] in pairs
    assert max(len(own) for own in pairs) == 4
