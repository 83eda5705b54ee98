"""Held-out items in a second table: from `prepare` on small tables to the records and manifest."""

import hashlib

import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from recsys.artifacts import PreparedData, Queries
from recsys.dataset import read_corpus, read_interactions, read_sequences
from training.prepare import prepare
from training.prepare.errors import LeakError, PrepareError
from training.prepare.held_out import (
    askable,
    build_queries,
    check_later,
    count_queries,
    report_held_out,
)
from training.tfrecord import register

ORDERED = {"user": "u", "item": "i", "order": ["n"]}
FEATURES = [
    {"name": "history", "side": "query", "kind": "history", "of": "item_id", "length": 3},
    {"name": "user_id", "side": "query", "kind": "id", "column": "user"},
    {"name": "city", "side": "query", "kind": "category", "column": "c"},
    {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
]
CLICKS = {"a": "vwxy", "b": "wxyv", "c": "xyvw", "d": "v"}
#: Of `a` one item was seen and one comes twice, `z` is in no event, `new` neither.
HELD_OUT = [
    ("a", "x"), ("a", "q"), ("a", "z"), ("a", "q"), ("b", "q"), ("d", "w"), ("d", "y"),
    ("new", "v"), ("new", "x"), (None, "v"), ("b", None), ("b", "two\nlines"), (" ", "v"),
]  # fmt: skip


@pytest.fixture(scope="module")
def clicks(click):
    rows = [
        click(user, item, n=str(n), c=f"city {n}")
        for user, items in CLICKS.items()
        for n, item in enumerate(items)
    ]
    return [*rows, click("e", "q", n="0"), click("e", "v", n="1")]


@pytest.fixture(scope="module")
def held_out(spark):
    """Make rows of user, item (and time) the temporary view `held`."""

    def make(rows, schema="who string, what string"):
        register(spark)
        spark.createDataFrame(rows, schema).createOrReplaceTempView("held")

    return make


@pytest.fixture(scope="module")
def asked(configure):
    def make(features=FEATURES, time=None, **data):
        columns = {"user": "who", "item": "what", **({"time": time} if time else {})}
        data.setdefault("split", {"kind": "held_out"})
        data.setdefault("columns", ORDERED)
        return configure(features, held_out={"table": "held", "columns": columns}, **data)

    return make


@pytest.fixture
def queries_of(stages):
    """Build the queries alone; returns them by user, and the report."""

    def make(rows, config):
        made = stages(rows, config)
        queries = build_queries(made.events, made.users, made.tables, config)
        report = report_held_out(queries, made.corpus, made.tables, config)
        check_later(queries)
        asked = askable(queries, config)
        counts = count_queries(asked, made.corpus)
        return {row["user"]: row for row in asked.collect()}, report, counts

    return make


@pytest.fixture(scope="module")
def data(spark, show, clicks, held_out, asked, tmp_path_factory):
    show(clicks)
    held_out(HELD_OUT)
    return prepare(asked(), spark, tmp_path_factory.mktemp("held_out") / "data")


def records_of(data):
    for raw in tf.data.TFRecordDataset(data.files(data.test)):
        example = tf.train.Example.FromString(raw.numpy())
        yield {
            name: [v.decode() if isinstance(v, bytes) else v for v in value]
            for name, feature in example.features.feature.items()
            for value in [getattr(feature, feature.WhichOneof("kind") or "bytes_list").value]
        }


def test_a_user_s_held_out_items_are_one_query(data):
    records = {record["user"][0]: record for record in records_of(data)}
    assert records == {
        "a": {
            "user": ["a"], "label": ["q", "x", "z"], "history": ["w", "x", "y"],
            "user_id": ["a"], "city": ["city 3"],
        },
        "b": {
            "user": ["b"], "label": ["q"], "history": ["x", "y", "v"],
            "user_id": ["b"], "city": ["city 3"],
        },
        "d": {
            "user": ["d"], "label": ["w", "y"], "history": ["v"],
            "user_id": ["d"], "city": ["city 0"],
        },
        "new": {"user": ["new"], "label": ["v", "x"], "history": [], "user_id": ["new"]},
    }  # fmt: skip
    assert {key: n for key, n in data.cleaning.items() if key.startswith("held out")} == {
        "held out: rows read": 13,
        "held out: null user": 2,
        "held out: null item": 1,
        "held out: line break in id": 1,
        "held out: duplicate": 1,
        "held out: labels": 8,
        "held out: labels of no candidate": 1,
    }
    assert isinstance(data.test, Queries)
    assert (data.test.num_examples, data.test.num_labels) == (4, 8)
    assert (data.test.num_cold_users, data.test.num_cold_items) == (1, 1)
    assert (data.test.first_at, data.test.last_at) == (None, None)
    assert data.sources["held_out"].num_rows == 13
    loaded = PreparedData.load(data.directory)
    assert loaded.test == data.test
    corpus = read_corpus(loaded)
    assert sorted(corpus.item) == [b"q", b"v", b"w", b"x", b"y"]
    queries = read_interactions(loaded, loaded.test, corpus)
    rows = {item: row for row, item in enumerate(corpus.item)} | {b"z": -1}
    assert [len(queries), len(queries.label), queries.splits[-1]] == [4, 8, 8]
    for user, first, last in zip(queries.user_id, queries.splits, queries.splits[1:], strict=False):
        labels = records[user.decode()]["label"]
        assert queries.label[first:last].tolist() == [rows[i.encode()] for i in labels]


def digests(data):
    """Contents by folder, users aside: Spark's Parquet files of equal rows may differ."""
    return {
        (file.parent.name, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in data.directory.glob("*/[!._]*")
        if file.parent.name != data.users
    }


def test_nothing_that_learns_changes_with_the_held_out_table(
    data, spark, show, clicks, held_out, asked, tmp_path
):
    one = data
    show(clicks)
    held_out([("a", "never seen"), *[("stranger", item) for item in "vwxyz"]])
    other = prepare(asked(), spark, tmp_path / "other")
    folders = {folder for folder, _ in digests(one)}
    assert folders == {"train", "recent", "validation", "corpus", "vocabularies", "test"}
    assert {folder for folder, _ in digests(one) ^ digests(other)} == {"test"}
    users = [pq.read_table(data.directory / data.users) for data in (one, other)]
    assert users[0].equals(users[1])
    learned = {"train", "recent", "validation", "corpus", "vocabularies", "statistics"}
    assert one.model_dump(include=learned) == other.model_dump(include=learned)
    corpus = read_corpus(one)
    validation = read_interactions(one, one.validation, corpus)
    assert validation.splits is None
    found = zip(validation.user_id, corpus.item[validation.label], strict=True)
    assert sorted(found) == [(b"a", b"y"), (b"b", b"v"), (b"c", b"w"), (b"e", b"v")]
    trained = read_sequences(one, one.train, corpus)
    assert len(trained) == sum(map(len, CLICKS.values())) + 2 - 4


def test_seen_items_are_no_labels_where_they_are_never_recommended(
    clicks, held_out, asked, queries_of
):
    held_out(HELD_OUT)
    queries, report, counts = queries_of(clicks, asked(exclude_seen=True, min_history=1))
    labels = {user: row["labels"] for user, row in queries.items()}
    assert labels == {"a": ["q", "z"], "b": ["q"], "d": ["w", "y"]}
    assert queries["a"]["exclusions"] == ["v", "w", "x", "y"]
    assert report["held out: seen before"] == 1
    assert report["held out: history too short"] == 2
    assert report["held out: labels"] == 5
    assert report["held out: rows read"] == 13 == sum(report.values()) - 13 - 1
    assert (counts["test"].num_examples, counts["test"].num_cold_users) == (3, 0)


DAYS = {"user": "u", "item": "i", "time": "t"}
TIMED = [FEATURES[0], {"name": "when", "side": "context", "kind": "time", "column": "time"}]
TIMED.append(FEATURES[-1])
DAY = 86_400_000_000
FIRST = 19_723 * DAY  # of January 2024


@pytest.fixture
def timed(click):
    return [click(user, item, day) for user in "ab" for day, item in enumerate("vwx", start=1)]


def test_a_last_share_of_time_can_validate(timed, held_out, asked, stages, queries_of):
    held_out([("a", "v"), ("b", "w"), ("new", "v")])
    config = asked(TIMED, columns=DAYS, split={"kind": "held_out", "validation_days": 1.5})
    windows = {(row["at"], row["window"]) for row in stages(timed, config).events.collect()}
    # One and a half days before the last event, of day 3: the moments of days 2 and 3.
    assert windows == {
        (FIRST, "train"),
        (FIRST + DAY, "validation"),
        (FIRST + 2 * DAY, "validation"),
    }
    queries, _, counts = queries_of(timed, config)
    assert counts["test"].first_at is None
    # As of the last event, as batch scoring asks; of a stranger nothing is known.
    when = {user: row["f_when"] for user, row in queries.items()}
    assert when == {"a": FIRST + 2 * DAY, "b": FIRST + 2 * DAY, "new": None}


def test_with_times_the_first_held_out_item_dates_the_query(timed, held_out, asked, queries_of):
    rows = [("a", "v", "2024-01-05"), ("a", "w", "2024-01-04"), ("b", "w", "2024-01-06")]
    held_out([*rows, ("b", "x", "no time")], "who string, what string, at string")
    queries, report, counts = queries_of(timed, asked(TIMED, "at", columns=DAYS))
    test = counts["test"]
    assert (test.first_at, test.last_at) == (FIRST + 3 * DAY, FIRST + 5 * DAY)
    assert report["held out: impossible time"] == 1
    assert queries["a"]["f_when"] == queries["a"]["at"] == FIRST + 3 * DAY


def test_an_event_after_the_held_out_items_is_refused(timed, held_out, asked, queries_of):
    rows = [("a", "v", "2024-01-03"), ("b", "w", "2024-01-04")]
    held_out(rows, "who string, what string, at string")
    with pytest.raises(LeakError, match=r"1 users, such as 'a', .*remove data\.held_out\.columns"):
        queries_of(timed, asked(TIMED, "at", columns=DAYS))


def test_features_of_users_without_events_come_from_the_user_table(
    spark, clicks, held_out, asked, queries_of
):
    held_out([("new", "v"), ("a", "q")])
    people = spark.createDataFrame([("new", "AT"), ("a", "DE")], "id string, country string")
    people.createOrReplaceTempView("people")
    features = [*FEATURES, {"name": "country", "side": "query", "kind": "category"}]
    queries, *_ = queries_of(clicks, asked(features, users={"table": "people", "key": "id"}))
    assert {user: row["f_country"] for user, row in queries.items()} == {"new": "AT", "a": "DE"}


def test_an_empty_table_is_told(clicks, held_out, asked, queries_of):
    held_out([])
    with pytest.raises(PrepareError, match=r"data\.held_out: held is empty"):
        queries_of(clicks, asked())


def test_a_table_without_a_label_is_told(spark, show, clicks, held_out, asked, tmp_path):
    show(clicks)
    held_out([(None, "v")])
    with pytest.raises(PrepareError, match=r"no test examples: data\.held_out has the test labels"):
        prepare(asked(), spark, tmp_path / "data")
