"""The data source under a real Spark session."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
import tensorflow as tf
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Row
from pyspark.sql.types import StructType

from training.tfrecord import register
from training.tfrecord.schema import to_arrow

FLAT = (
    "b boolean, y tinyint, s smallint, i int, l bigint, f float, d double, c decimal(9,2), "
    "t string, r binary, al array<int>, af array<double>, at array<string>, ar array<binary>"
)


@pytest.fixture
def tfr(spark):
    register(spark)
    return spark


def save(df, path, mode="overwrite", **options):
    df.write.format("tfrecord").options(**options).mode(mode).save(str(path))


def load(spark, path, schema=None, **options):
    reader = spark.read.format("tfrecord").options(**options)
    return (reader.schema(schema) if schema else reader).load(str(path))


def rows(df):
    return sorted(df.collect(), key=repr)


@pytest.fixture
def flat(tfr):
    from decimal import Decimal

    full = (True, -1, -2, -3, 2**62, 1.5, 2.5, Decimal("3.25"), "ü", bytearray(b"\xff"))
    data = [
        (*full, [1, -2], [0.5], ["a", ""], [bytearray(b"\0")]),
        (None,) * 14,
        (*full, [], [], [], []),
    ]
    return tfr.createDataFrame(data, FLAT).repartition(2)


@pytest.mark.parametrize("codec", ["none", "gzip", "org.apache.hadoop.io.compress.GzipCodec"])
def test_example_round_trip_of_all_types(tfr, flat, tmp_path, codec):
    out = tmp_path / "out"
    save(flat, out, codec=codec)
    names = sorted(p.name for p in out.iterdir())
    extension = ".tfrecord" if codec == "none" else ".tfrecord.gz"
    assert names[:2] == ["_SUCCESS", "_schema.json"]
    assert names[2:]
    assert all(n.startswith("part-0000") and n.endswith(extension) for n in names[2:])
    back = load(tfr, out)
    assert back.schema == flat.schema
    assert rows(back) == rows(flat)


def test_arrow_schema_is_what_spark_expects(flat):
    from pyspark.sql.pandas.types import to_arrow_schema

    assert to_arrow(flat.schema).equals(to_arrow_schema(flat.schema, timezone="UTC"))


def test_sequence_example_round_trip(tfr, tmp_path):
    data = [(1, [2, 3], [[1, 2], []], [["a"], ["b", "c"]]), (None, None, None, None)]
    df = tfr.createDataFrame(
        data, "c int, l array<bigint>, f array<array<bigint>>, g array<array<string>>"
    ).coalesce(1)
    save(df, tmp_path / "out", recordType="SequenceExample")
    (file,) = (tmp_path / "out").glob("part-*")
    first = next(iter(tf.data.TFRecordDataset(str(file)))).numpy()
    message = tf.train.SequenceExample.FromString(first)
    assert message.context.feature["c"].int64_list.value == [1]
    lists = message.feature_lists.feature_list["f"].feature
    assert [list(f.int64_list.value) for f in lists] == [[1, 2], []]
    assert rows(load(tfr, tmp_path / "out")) == rows(df)
    (tmp_path / "out" / "_schema.json").unlink()
    inferred = load(tfr, tmp_path / "out", recordType="SequenceExample")
    assert inferred.schema.simpleString() == (
        "struct<c:bigint,f:array<array<bigint>>,g:array<array<string>>,l:array<bigint>>"
    )
    assert rows(inferred.select("c", "l", "f", "g")) == rows(df)


def test_byte_array_round_trip_and_raw_reading_of_examples(tfr, tmp_path):
    df = tfr.createDataFrame([(bytearray(b"one"),), (bytearray(b""),)], "byteArray binary")
    save(df, tmp_path / "out", recordType="ByteArray")
    assert rows(load(tfr, tmp_path / "out")) == rows(df)
    save(tfr.range(3), tmp_path / "examples")
    raw = load(tfr, tmp_path / "examples", recordType="ByteArray").collect()
    values = [tf.train.Example.FromString(r[0]).features.feature["id"].int64_list for r in raw]
    assert sorted(v.value[0] for v in values) == [0, 1, 2]


def test_append_adds_and_overwrite_replaces(tfr, tmp_path):
    out = tmp_path / "out"
    for mode, count in (("append", 3), ("append", 6), ("overwrite", 3), ("append", 6)):
        save(tfr.range(3).coalesce(1), out, mode)
        assert load(tfr, out).count() == count
    assert "part-00000.tfrecord" in [p.name for p in out.iterdir()]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    save(load(tfr, out).filter("id = 1"), out)
    assert [r.id for r in load(tfr, out).collect()] == [1, 1]


@pytest.mark.parametrize(
    ("select", "options", "words"),
    [
        ("cast(id as string) id", {}, ["'id'", "bigint", "string"]),
        ("id, 1 extra", {}, ["'extra'", "overwrite"]),
        ("id", {"recordType": "SequenceExample"}, ["recordType", "SequenceExample"]),
    ],
)
def test_append_that_does_not_fit_is_refused(tfr, tmp_path, select, options, words):
    save(tfr.range(3), tmp_path / "out")
    with pytest.raises(PySparkException) as error:
        save(tfr.range(1).selectExpr(*select.split(", ")), tmp_path / "out", "append", **options)
    assert all(word in str(error.value) for word in words)
    assert load(tfr, tmp_path / "out").count() == 3


def test_output_is_byte_identical(tfr, flat, tmp_path):
    sums = []
    for name in ("one", "two"):
        ordered = flat.coalesce(1).sortWithinPartitions("at")
        save(ordered, tmp_path / name, codec="gzip")
        files = sorted((tmp_path / name).iterdir())
        sums.append([(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files])
    assert sums[0] == sums[1]
    assert len(sums[0]) == 3


def test_empty_partitions_and_empty_frames(tfr, tmp_path):
    save(tfr.range(1).repartition(4), tmp_path / "one")
    assert len(list((tmp_path / "one").glob("part-*"))) == 1
    save(tfr.range(0), tmp_path / "none")
    empty = load(tfr, tmp_path / "none")
    assert empty.collect() == []
    assert empty.schema.simpleString() == "struct<id:bigint>"


def test_given_schema_casts_and_adds_nulls(tfr, flat, tmp_path):
    save(flat, tmp_path / "out")
    back = load(tfr, tmp_path / "out" / "part-*", "i bigint, al array<tinyint>, r binary, z string")
    assert {tuple(r) for r in back.select("i", "z").collect()} == {(-3, None), (None, None)}
    with pytest.raises(PySparkException, match=r"part-0000.*byte \d+: feature 'l'.*fit.*int32"):
        load(tfr, tmp_path / "out", "l int").collect()


def foreign(path, *examples):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            features = {}
            for name, (kind, values) in example.items():
                lists = {
                    "i": lambda v: {"int64_list": tf.train.Int64List(value=v)},
                    "f": lambda v: {"float_list": tf.train.FloatList(value=v)},
                    "b": lambda v: {"bytes_list": tf.train.BytesList(value=v)},
                    "-": lambda v: {},
                }
                features[name] = tf.train.Feature(**lists[kind](values))
            message = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(message.SerializeToString())


def test_inference_does_not_depend_on_file_order(tfr, tmp_path):
    many = {"x": ("i", [1, 2]), "n": ("-", []), "e": ("f", []), "t": ("b", [b"text"])}
    one = {"x": ("i", [3]), "y": ("f", [0.5]), "t": ("b", ["ü".encode()]), "r": ("b", [b"\xff"])}
    expected = "struct<e:array<float>,n:array<binary>,r:binary,t:string,x:array<bigint>,y:float>"
    for name, pair in (("ab", (many, one)), ("ba", (one, many))):
        (tmp_path / name).mkdir()
        foreign(tmp_path / name / "a", *[one] * 20, pair[0])
        foreign(tmp_path / name / "b", pair[1])
        df = load(tfr, tmp_path / name)
        assert df.schema.simpleString() == expected
        assert df.filter("size(x) = 2").select("y", "n", "e", "t").collect() == [
            Row(y=None, n=None, e=[], t="text")
        ]


def test_inference_refuses_a_feature_of_two_kinds(tfr, tmp_path):
    foreign(tmp_path / "a", {"x": ("i", [1])})
    foreign(tmp_path / "b", {"x": ("f", [1.0])})
    with pytest.raises(PySparkException, match=r"'x'.*int64_list in .*a and float_list in .*b"):
        load(tfr, tmp_path)


@pytest.mark.parametrize(
    ("options", "schema", "words"),
    [
        ({"codec": "snappy"}, "id bigint", ["codec", "snappy"]),
        ({"recordType": "Nope"}, "id bigint", ["recordType", "Nope"]),
        ({"recordType": "ByteArray"}, "id bigint", ["byteArray", "id"]),
        ({}, "d date", ["'d'", "date", "cast"]),
        ({}, "m map<string,int>", ["'m'", "map<string,int>"]),
        ({}, "a array<array<int>>", ["'a'", "SequenceExample"]),
    ],
)
def test_write_that_cannot_work_fails_before_any_task(tfr, tmp_path, options, schema, words):
    with pytest.raises(PySparkException) as error:
        save(tfr.createDataFrame([], schema), tmp_path / "out", **options)
    assert all(word in str(error.value) for word in words), error.value
    assert list(tmp_path.iterdir()) == []


def test_damage_is_explained_in_the_drivers_exception(tfr, tmp_path):
    save(tfr.range(100).coalesce(1), tmp_path / "out")
    (file,) = (tmp_path / "out").glob("part-*")
    whole = bytearray(file.read_bytes())
    whole[-2] ^= 1
    file.write_bytes(whole)
    with pytest.raises(PySparkException, match=f"{file}: corrupt TFRecord: record 99 at byte"):
        load(tfr, tmp_path / "out").collect()
    file.write_bytes(whole[:-10])
    with pytest.raises(PySparkException, match=f"{file}: truncated TFRecord: record 99 at byte"):
        load(tfr, tmp_path / "out").collect()


def null_element(spark):
    return spark.range(0, 50_000, 1, 2).selectExpr("if(id = 49999, array(null), array(id)) id")


def killed_worker(spark):
    def die(batches):
        yield next(batches)
        os.kill(os.getpid(), signal.SIGKILL)

    return spark.range(0, 50_000, 1, 2).mapInArrow(die, "id bigint")


@pytest.mark.parametrize(
    ("mode", "failing", "why"),
    [
        ("overwrite", null_element, "'id': expected no null array element"),
        ("append", killed_worker, "Python worker exited unexpectedly"),
    ],
)
def test_failing_task_leaves_the_old_data_alone(tfr, tmp_path, mode, failing, why):
    save(tfr.range(5), tmp_path / "out")
    # A dead worker reaches Python as a bare Py4JJavaError.
    with pytest.raises((PySparkException, Py4JJavaError), match=why):
        save(failing(tfr), tmp_path / "out", mode)
    assert load(tfr, tmp_path / "out").count() == 5
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_full_disk_fails_with_the_path_and_keeps_the_old_data(tfr, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        save(tfr.range(5), tmp_path / "out")
        with pytest.raises(PySparkException, match=r"No space left.*\.out\.staging-.*part-"):
            save(tfr.range(200_000), tmp_path / "out")
        assert load(tfr, tmp_path / "out").count() == 5
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


WRITER = """
    import sys, time
    from pyspark.sql import SparkSession
    from training.tfrecord import register

    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    spark = builder.getOrCreate()
    register(spark)

    def slow(batches):
        for number, batch in enumerate(batches):
            yield batch
            time.sleep(0.05 if number < 3 else 600)

    df = spark.range(0, 200_000, 1, 2).mapInArrow(slow, "id bigint")
    df.write.format("tfrecord").mode("overwrite").save(sys.argv[1])
"""


def test_kill_9_of_a_writing_spark_leaves_the_old_data(tfr, tmp_path):
    out, script, log = tmp_path / "data" / "out", tmp_path / "writer.py", tmp_path / "log"
    save(tfr.range(5), out)
    script.write_text(textwrap.dedent(WRITER))
    with log.open("wb") as output:
        writer = subprocess.Popen(
            [sys.executable, str(script), str(out)],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    try:
        deadline = time.monotonic() + 150
        while not staged(out):
            assert writer.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the writer staged nothing"
            time.sleep(0.1)
    finally:
        if writer.poll() is None:
            os.killpg(writer.pid, signal.SIGKILL)
        writer.wait()
    assert staged(out), "killed too late to prove anything"
    assert load(tfr, out).count() == 5
    assert load(tfr, out.parent / "*").count() == 5
    save(tfr.range(3), out)
    assert load(tfr, out).count() == 3
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def staged(out):
    """Return whether a job has staged some, but not all, bytes for this target."""
    files = out.parent.glob(f".{out.name}.staging-*/attempts/part-*")
    return any(file.stat().st_size for file in files)


def test_sidecars_of_several_directories_are_merged(tfr, tmp_path):
    save(tfr.range(1).selectExpr("id", "1 a"), tmp_path / "d1")
    save(tfr.range(1).selectExpr("id", "'x' b"), tmp_path / "d2")
    df = load(tfr, tmp_path / "d*")
    assert df.schema == StructType.fromDDL("id bigint, a int, b string")
    save(tfr.range(1).selectExpr("id", "2.5D a"), tmp_path / "d3")
    with pytest.raises(PySparkException, match="'a': expected type int"):
        load(tfr, tmp_path / "d*")
