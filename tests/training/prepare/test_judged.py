from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import tensorflow as tf
from pyspark.sql import functions as F

from recsys.dataset import parse_examples
from recsys.judged import judged_spec
from recsys.model_config import Joint
from training.prepare.errors import LeakError, PrepareError
from training.prepare.judged import count_judged, last_judged
from training.prepare.split import check_no_leak
from training.prepare.tfrecords import WindowCounts, write_sequences
from training.tfrecord import register

JOINT = Joint(positive=("like",))


@pytest.fixture
def configured(configure):
    columns = {"user": "u", "item": "i", "time": "t", "event": "e"}
    types = {"like": {"weight": 2.0}, "dislike": {"label": False}}
    made = configure(columns=columns, event_types=types, shards=1, exclude_seen=True)
    return made.model_copy(update={"model": made.model.model_copy(update={"joint": JOINT})})


@pytest.fixture
def made(stages, click, configured):
    """Validation is from the 20th, test from the 25th."""
    rows = [
        click("a", "x", 1, e="like"),
        click("a", "y", 2, e="dislike"),
        click("a", "z", 3, e="dislike"),
        # Seen before: nobody is asked again.
        click("a", "y", 4, e="like"),
        click("a", "v", 5, e="dislike"),
        # Nothing to retrieve in any window.
        click("b", "x", 6, e="dislike"),
        click("a", "w", 21, e="like"),
        click("a", "u", 22, e="dislike"),
        click("a", "t", 26, e="like"),
    ]
    return stages(rows, configured)


def listed(training):
    rows = training.orderBy("user", "first").collect()
    return [
        (
            row["user"],
            [(e["item"], e["known"]) for e in row["labels"]],
            [(e["item"], e["event"], e["known"]) for e in row["judged"]],
            list(row["h_history"]),
        )
        for row in rows
    ]


def test_events_of_the_named_types_are_judged_beside_the_labels(made, configured, spark, tmp_path):
    train, recent = listed(made.training), listed(made.recent)
    # A history of three: the last events lie in a second piece of it.
    assert [(u, labels, judged) for u, labels, judged, _ in train] == [
        ("a", [("x", 0)], [("x", "like", 0), ("y", "dislike", 1), ("z", "dislike", 2)]),
        ("a", [], [("v", "dislike", 3)]),
        ("b", [], [("x", "dislike", 0)]),
    ]
    assert [history for *_, history in train] == [["x", "y"], ["y", "z", "y"], []]
    assert recent == [
        ("a", [("w", 3)], [("w", "like", 3)], ["z", "y", "v"]),
        ("a", [], [("u", "dislike", 3)], ["y", "v", "w"]),
    ]
    register(spark)
    count = WindowCounts("train", 1, 0, 0, 0, 0)
    written = write_sequences(made.training, configured, tmp_path / "train", count)
    assert (written.num_sequences, written.num_examples) == (3, 1)
    _check_records(tmp_path / "train", configured)
    counts = count_judged({"train": made.training, "recent": made.recent}, JOINT)
    assert counts == {"train": {"dislike": 4, "like": 1}, "recent": {"dislike": 1, "like": 1}}
    # Later than the last label of training, on the first.
    assert last_judged(made.training, configured) == datetime(2024, 1, 6, tzinfo=UTC)
    with pytest.raises(PrepareError, match=r"train has no judged event that is of .*'looked'"):
        count_judged({"train": made.training}, Joint(positive=("looked",)))


def _check_records(folder, configured):
    spec = judged_spec(SimpleNamespace(judged={"train": {}}, features=configured.schema_))
    records = [r for file in folder.glob("part-*") for r in tf.data.TFRecordDataset(str(file))]
    parsed = parse_examples(tf.stack(records), spec)
    found = zip(
        *(parsed[f"judged.{n}"].to_list() for n in ("item", "event", "weight")), strict=True
    )
    assert sorted(map(repr, found)) == sorted(
        map(
            repr,
            [
                ([b"x", b"y", b"z"], [b"like", b"dislike", b"dislike"], [2.0, 1.0, 1.0]),
                ([b"v"], [b"dislike"], [1.0]),
                ([b"x"], [b"dislike"], [1.0]),
            ],
        )
    )


def test_a_judged_event_that_knows_its_own_time_is_a_leak(made, configured, spark):
    first = F.col("judged")[0]
    own = F.array(F.struct(first["at"].alias("at"), first["order"].alias("order")))
    known = F.transform("judged", lambda e: e.withField("known", F.lit(1)))
    leaking = made.training.filter("user = 'b'").withColumns(
        {"judged": known, "moments": own, "stages": F.array(F.lit(0))}
    )
    lines = spark.createDataFrame([], "feature string, value string")
    with pytest.raises(LeakError, match="training labels have an event in their history"):
        check_no_leak(
            made.events, made.examples, leaking, lines, configured.data.split, made.points
        )
