from datetime import UTC, datetime

import pytest
from pyspark.sql import functions as F

from recsys.split_config import HeldOutSplit, LeaveLastOut, TimeSplit
from training.prepare.errors import LeakError, PrepareError
from training.prepare.split import SplitPoints, check_no_leak, split_points
from training.prepare.values import to_microseconds

TIME = TimeSplit(kind="time", validation_days=1, test_days=1)
DAY = 86_400_000_000
ORDER = {"user": "u", "item": "i", "order": ["n"], "event": "e"}


def windows_of(events):
    rows = sorted((row["user"], row["position"], row["window"]) for row in events.collect())
    return {user: " ".join(window for own, _, window in rows if own == user) for user, *_ in rows}


def test_days_count_back_from_the_last_event():
    points = split_points(TimeSplit(kind="time", validation_days=2, test_days=1.5), 10 * DAY)
    assert points == SplitPoints(validation_from=int(6.5 * DAY), test_from=int(8.5 * DAY))


@pytest.mark.parametrize("days", [2, 2.5])
def test_held_out_items_test_after_the_last_event(days):
    split = HeldOutSplit(kind="held_out", validation_days=days)
    test_from = 10 * DAY + 1
    assert split_points(split, 10 * DAY) == SplitPoints(test_from - int(days * DAY), test_from)


@pytest.mark.parametrize(
    "split", [HeldOutSplit(kind="held_out"), LeaveLastOut(kind="leave_last_out")]
)
def test_where_time_does_not_split_there_are_no_points(split):
    assert split_points(split, 10 * DAY) is None


def test_dates_may_have_a_zone():
    split = TimeSplit(
        kind="time", validation_from="2024-01-01T08:00:00+08:00", test_from="2024-01-02"
    )
    points = split_points(split, 0)
    assert points.validation_from == to_microseconds(datetime(2024, 1, 1, tzinfo=UTC))
    assert points.test_from - points.validation_from == DAY


def test_validation_must_begin_before_test():
    split = TimeSplit(kind="time", validation_from="2024-01-03", test_from="2024-01-02")
    with pytest.raises(PrepareError, match=r"data\.split: validation begins 2024-01-03"):
        split_points(split, 0)


def test_time_split_is_half_open(stages, click, configure):
    days = [1, 19.999, 20, 24.999, 25, 30]
    events = stages([click("a", f"i{d}", d) for d in days], configure()).events
    assert windows_of(events) == {"a": "train train validation validation test test"}


def test_leave_last_out_by_labels(stages, click, configure):
    kinds = {"view": {"label": False}, "buy": {}}
    sequences = {
        "three": "buy buy buy",
        "two": "view buy buy",
        "views": "buy view buy view buy view buy view",
    }
    rows = [
        click(user, f"i{n}", n=str(n), e=kind)
        for user, text in sequences.items()
        for n, kind in enumerate(text.split())
    ]
    config = configure(columns=ORDER, event_types=kinds, split={"kind": "leave_last_out"})
    made = stages(rows, config)
    assert windows_of(made.events) == {
        "three": "train validation test",
        "two": "train train train",
        # What follows a label goes with the next one; the last view comes after the test.
        "views": "train train train train validation validation test test",
    }
    labels = [(r["user"], r["window"], r["item"]) for r in made.examples.collect()]
    assert sorted(label for label in labels if label[1] != "train") == [
        ("three", "test", "i2"),
        ("three", "validation", "i1"),
        ("views", "test", "i6"),
        ("views", "validation", "i4"),
    ]


def test_given_windows_limit_what_a_history_holds(stages, click, configure):
    windows = ["context", "test", "validation", "train", "validation", "test", "train"]
    rows = [click("a", f"{w[0]}{n}", n=str(n), w=w) for n, w in enumerate(windows)]
    config = configure(
        columns={"user": "u", "item": "i", "order": ["n"]},
        split={"kind": "given", "column": "w"},
    )
    made = stages(rows, config)
    histories = {row["item"]: row["f_history"] for row in made.examples.collect()}
    assert histories == {
        "t1": ["c0"],
        "v2": ["c0"],
        "t3": ["c0"],
        "v4": ["c0", "v2", "t3"],
        "t5": ["v2", "t3", "v4"],
        "t6": ["c0", "t3"],
    }
    counts = {row["item"]: row["count"] for row in made.corpus.collect()}
    assert {item for item, count in counts.items() if count} == {"t3", "t6"}


def test_rare_training_events_are_hidden_from_training_alone(stages, click, configure):
    rows = [
        *(click(user, "common", day) for user in "abc" for day in (1, 3)),
        click("a", "rare", 2),
        click("d", "common", 1),
        click("d", "rare", 21),
        click("a", "common", 26),
    ]
    config = configure(cleaning={"min_item_events": 2, "min_user_events": 2})
    made = stages(rows, config)
    rare = sorted((row["user"], row["rare"]) for row in made.events.collect() if row["rare"])
    assert rare == [("a", "item"), ("d", "user")]
    histories = {
        (row["user"], row["window"]): row["f_history"]
        for row in made.examples.orderBy("at").collect()
    }
    assert histories == {
        ("a", "train"): ["common"],
        ("b", "train"): ["common"],
        ("c", "train"): ["common"],
        ("d", "validation"): ["common"],
        ("a", "test"): ["common", "rare", "common"],
    }
    counts = {row["item"]: row["count"] for row in made.corpus.collect()}
    assert counts == {"common": 6, "rare": 0}


@pytest.fixture
def honest(stages, click, configure, spark):
    rows = [click(u, f"{u}{d}", d) for u in "ab" for d in (1, 5, 21, 26)]
    made = stages(rows, configure())
    made.lines = spark.createDataFrame(
        [("item_id", "a1"), ("item_id", "b5")], "feature string, value string"
    )
    return made


def test_honest_data_passes(honest):
    check_no_leak(
        honest.events, honest.examples, honest.training, honest.lines, TIME, honest.points
    )


def test_future_event_marked_as_training_is_refused(honest):
    leaking = honest.events.withColumns({"trains": F.lit(True), "window": F.lit("train")})
    with pytest.raises(LeakError, match=r"4 training events lie at or after 2024-01-20"):
        check_no_leak(leaking, honest.examples, honest.training, honest.lines, TIME, honest.points)


def test_event_of_another_window_that_trains_is_refused(honest):
    leaking = honest.events.withColumn("trains", F.col("window") != "test")
    with pytest.raises(LeakError, match=r"2 events outside the training window"):
        check_no_leak(leaking, honest.examples, honest.training, honest.lines, TIME, honest.points)


def test_user_whose_training_follows_the_test_is_refused(honest):
    late = (F.col("user") == "b") & (F.col("position") == 3)
    swapped = F.when(late, "train").when(F.col("position") == 0, "test").otherwise(F.col("window"))
    leaking = honest.events.withColumn("window", swapped)
    leaking = leaking.withColumn("trains", F.col("window") == "train")
    # Time does not split here, as with leave-last-out.
    with pytest.raises(LeakError, match=r"2 users, such as 'a', have a training event"):
        check_no_leak(leaking, honest.examples, honest.training, honest.lines, TIME, None)


def test_history_that_reaches_its_label_is_refused(honest):
    leaking = honest.examples.withColumn("newest", F.struct("at", "order"))
    with pytest.raises(LeakError, match=r"8 examples have an event .* not before the label"):
        check_no_leak(honest.events, leaking, honest.training, honest.lines, TIME, honest.points)


def test_history_of_a_later_window_is_refused(honest):
    leaking = honest.examples.withColumn("stage", F.lit(3))
    with pytest.raises(LeakError, match=r"6 examples have an event of a later window"):
        check_no_leak(honest.events, leaking, honest.training, honest.lines, TIME, honest.points)


def test_training_label_that_its_history_reaches_is_refused(honest):
    later = F.transform("moments", lambda m: m.withField("at", m["at"] + 10 * DAY))
    leaking = honest.training.withColumn("moments", later)
    with pytest.raises(LeakError, match=r"2 training labels have an event .* not before the label"):
        check_no_leak(honest.events, honest.examples, leaking, honest.lines, TIME, honest.points)


def test_training_history_of_a_later_window_is_refused(honest):
    leaking = honest.training.withColumn("stages", F.transform("stages", lambda stage: stage + 1))
    with pytest.raises(LeakError, match=r"2 training labels have an event of a later window"):
        check_no_leak(honest.events, honest.examples, leaking, honest.lines, TIME, honest.points)


def test_vocabulary_of_the_future_is_refused(honest, spark):
    lines = honest.lines.unionAll(spark.createDataFrame([("item_id", "a26")], honest.lines.schema))
    with pytest.raises(LeakError, match=r"vocabulary 'item_id' holds 'a26', which no training"):
        check_no_leak(honest.events, honest.examples, honest.training, lines, TIME, honest.points)
