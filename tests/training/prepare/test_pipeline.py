"""`prepare` as a whole, on a small click table with everything in it."""

import hashlib
import random
import subprocess
from datetime import datetime, timedelta

import pytest

from recsys.artifacts import PreparedData
from recsys.config import ConfigError, RunConfig
from training.prepare import PrepareError, prepare
from training.tfrecord import register

FEATURES = [
    {"name": "history", "side": "query", "kind": "history", "of": "item_id", "length": 5},
    {"name": "kinds", "side": "query", "kind": "history", "of": "last_kind", "length": 5},
    {"name": "last_kind", "side": "query", "kind": "category", "column": "event type"},
    {"name": "clicked_at", "side": "context", "kind": "time", "column": "time"},
    {"name": "spent", "side": "query", "kind": "number", "column": "price (€)"},
    {"name": "item_id", "side": "candidate", "kind": "id", "column": "item"},
    {"name": "price", "side": "candidate", "kind": "number", "column": "price (€)"},
]


def write_clicks(file, users=12):
    rng = random.Random(7)
    lines = ["user;the item;when;event type;price (€);page"]
    for user in range(users):
        for n in range(12):
            item = rng.randrange(8) if n < 9 else rng.randrange(10)
            when = f"2024-01-{1 + 2 * n:02d} 0{rng.randrange(3)}:00:00"
            kind = rng.choice(["view", "view", "buy"])
            lines.append(f"u{user};鞋{item};{when};{kind};{item * 1.5};{n}")
    lines += [";鞋1;2024-01-01;view;1;1", "u1;鞋1;never;view;1;1", lines[1]]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def expected_counts(file):
    """Count the labels of each window: all events but the first of each user."""
    times = {}
    for line in dict.fromkeys(file.read_text("utf-8").splitlines()[1:]):
        user, _, when, *_ = line.split(";")
        if user and len(when) == len("2024-01-01 00:00:00"):
            times.setdefault(user, []).append(datetime.fromisoformat(when))
    last = max(max(own) for own in times.values())
    test, validation = last - timedelta(days=4), last - timedelta(days=7)
    labels = [when for own in times.values() for when in sorted(own)[1:]]
    num_train = sum(when < validation for when in labels)
    num_test = sum(when >= test for when in labels)
    return [num_train, len(labels) - num_train - num_test, num_test]


def config_of(file, **data):
    columns = {"user": "user", "item": "the item", "time": "when", "event": "event type"}
    events = {
        "path": str(file),
        "format": "csv",
        "options": {"sep": ";", "header": "true"},
        "columns": columns,
    }
    base = {
        "events": events,
        "event_types": {"view": {"weight": 1}, "buy": {"weight": 2}},
        "split": {"kind": "time", "validation_days": 3, "test_days": 4},
        "min_history": 1,
        "shards": 2,
    }
    registry = {"model": "test"}
    cluster = {"master": "local[1]", "spark": {"spark.sql.shuffle.partitions": "2"}}
    return RunConfig.model_validate(
        {"name": "test", "data": base | data, "features": FEATURES}
        | {"registry": registry, "cluster": cluster}
    )


def digests(folder):
    """Hash every file of data; the names of Parquet files are random by design of Spark."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    kept = [f for f in files if f.suffix in (".tfrecord", ".txt")]
    assert len(kept) >= 7
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in kept}


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    file = tmp_path_factory.mktemp("clicks") / "clicks.csv"
    write_clicks(file)
    return file


@pytest.fixture(scope="module")
def prepared(spark, clicks, tmp_path_factory):
    register(spark)
    return prepare(config_of(clicks), spark, tmp_path_factory.mktemp("prepared") / "data")


def test_manifest_tells_what_is_there(prepared, clicks):
    assert PreparedData.load(prepared.directory).model_dump() == prepared.model_dump()
    assert prepared.cleaning == {
        "events read": 147,
        "null user": 1,
        "null item": 0,
        "line break in id": 0,
        "impossible time": 1,
        "event type not listed": 0,
        "duplicate": 1,
        "kept": 144,
    }
    counts = [s.num_examples for s in (prepared.train, prepared.validation, prepared.test)]
    assert counts == expected_counts(clicks)
    assert prepared.train.last_at < prepared.validation.first_at < prepared.test.first_at
    assert prepared.num_users == 12
    assert prepared.vocabularies["last_kind"].size == 2
    assert prepared.vocabularies["item_id"].size == prepared.corpus.num_warm
    assert set(prepared.statistics) == {"spent", "price"}
    assert prepared.statistics["price"].std > 0
    assert prepared.sources["events"].num_rows == 147
    assert prepared.files(prepared.train)
    assert prepared.files(prepared.corpus)


def test_again_with_other_partitions_gives_the_same_bytes(spark, prepared, clicks, tmp_path):
    directory = tmp_path / "data"
    (directory / "train").mkdir(parents=True)
    (directory / "train" / "part-00009.tfrecord").write_bytes(b"left by an older attempt")
    (directory / ".train.staging-dead").mkdir()
    before = spark.conf.get("spark.sql.shuffle.partitions")
    spark.conf.set("spark.sql.shuffle.partitions", "5")
    try:
        again = prepare(config_of(clicks), spark, directory)
    finally:
        spark.conf.set("spark.sql.shuffle.partitions", before)
    assert digests(directory) == digests(prepared.directory)
    same = {"created_at", "directory"}
    assert again.model_dump(exclude=same) == prepared.model_dump(exclude=same)
    assert not list(directory.glob(".train*"))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            {"validation_from": "2020-01-01", "test_from": "2020-01-02"},
            r"no train and no validation examples: the events span 2024-01-01 .* to 2024-01-2.*"
            r"validation begins 2020-01-01.*see data\.split\.validation_from",
        ),
        (
            {"validation_from": "2024-01-10", "test_from": "2030-01-01"},
            r"no test examples: .*test begins 2030-01-01.*data\.split",
        ),
    ],
)
def test_empty_windows_are_told(spark, clicks, tmp_path, split, message):
    config = config_of(clicks, split={"kind": "time", **split})
    with pytest.raises(PrepareError, match=message):
        prepare(config, spark, tmp_path / "data")
    assert not PreparedData.exists(tmp_path / "data")


def test_leave_last_out_needs_three_events(spark, tmp_path):
    file = tmp_path / "clicks.csv"
    file.write_text(
        "user;the item;when;event type;price (€)\na;x;2024-01-01;view;1\na;y;2024-01-02;view;1\n",
        encoding="utf-8",
    )
    config = config_of(file, split={"kind": "leave_last_out"})
    with pytest.raises(
        PrepareError, match=r"no validation and no test examples: .*3 events or more"
    ):
        prepare(config, spark, tmp_path / "data")


def test_one_user_is_enough(spark, tmp_path):
    register(spark)
    write_clicks(tmp_path / "clicks.csv", users=1)
    data = prepare(config_of(tmp_path / "clicks.csv"), spark, tmp_path / "data")
    assert data.num_users == 1
    assert data.train.num_examples > 0
    assert data.test.num_cold_users == 0


def test_empty_table(spark, tmp_path):
    file = tmp_path / "clicks.csv"
    file.write_text("user;the item;when;event type;price (€)\n", encoding="utf-8")
    with pytest.raises(PrepareError, match="is empty; expected at least one event"):
        prepare(config_of(file), spark, tmp_path / "data")


def test_expression_that_fails_on_a_value(spark, clicks, tmp_path):
    config = config_of(clicks)
    events = config.data.events.model_copy(update={"derive": {"n": "cast(`the item` as int)"}})
    drop = config.data.cleaning.model_copy(update={"drop": {"odd": "n > 3"}})
    data = config.data.model_copy(update={"events": events, "cleaning": drop})
    with pytest.raises(PrepareError, match=r"SQL expression .*'鞋\d'.* Use try_cast"):
        prepare(config.model_copy(update={"data": data}), spark, tmp_path / "data")


def test_full_disk_names_the_folder(spark, clicks, tmp_path):
    register(spark)
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(PrepareError, match=f"no space left on device while writing {small}"):
            prepare(config_of(clicks), spark, small / "data")
        assert not PreparedData.exists(small / "data")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_wrong_column_is_told_before_spark_is_asked(clicks, tmp_path):
    config = config_of(clicks)
    data = config.data.model_dump()
    data["events"]["columns"]["item"] = "item"
    data["events"]["columns"]["user"] = "usr"
    wrong = config.model_copy(update={"data": type(config.data).model_validate(data)})
    with pytest.raises(ConfigError, match=r"'usr'.*did you mean 'user'"):
        prepare(wrong, None, tmp_path)
