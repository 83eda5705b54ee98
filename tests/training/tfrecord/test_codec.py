"""The codec against TensorFlow's own protobuf classes, in both directions."""

import os
import random

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings

from training.tfrecord import RecordType, TFRecordError, encode_records
from training.tfrecord.decode import decode_records
from training.tfrecord.errors import RecordError

SEQUENCE = RecordType.SEQUENCE
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

floats = st.floats(width=32, allow_nan=False)
texts = st.text(max_size=8)
LEAVES = {
    pa.bool_(): st.booleans(),
    pa.int8(): st.integers(-(2**7), 2**7 - 1),
    pa.int16(): st.integers(-(2**15), 2**15 - 1),
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float32(): floats,
    pa.float64(): floats,
    pa.string(): st.one_of(texts, st.just("ü" * 70)),
    pa.binary(): st.one_of(st.binary(max_size=8), st.binary(min_size=200, max_size=300)),
}


@st.composite
def batches(draw, deepest):
    """A batch of up to six rows and five columns of any supported type, with nulls."""
    rows = draw(st.integers(0, 6))
    names = draw(st.lists(st.text(max_size=5), min_size=1, max_size=5, unique=True))
    arrays = []
    for _ in names:
        leaf = draw(st.sampled_from(list(LEAVES)))
        kind, values = leaf, LEAVES[leaf]
        for _ in range(draw(st.integers(0, deepest))):
            kind, values = pa.list_(kind), st.lists(values, max_size=4)
        column = draw(st.lists(st.none() | values, min_size=rows, max_size=rows))
        arrays.append(pa.array(column, kind))
    return pa.record_batch(arrays, names=names)


def leaf_of(kind):
    return leaf_of(kind.value_type) if pa.types.is_list(kind) else kind


def feature(kind, values):
    """Build a Feature with TensorFlow's classes."""
    values = values if isinstance(values, list) else [values]
    leaf = leaf_of(kind)
    if pa.types.is_floating(leaf):
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))
    if pa.types.is_string(leaf) or pa.types.is_binary(leaf):
        raw = [v.encode() if isinstance(v, str) else v for v in values]
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=raw))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[int(v) for v in values]))


def as_messages(batch, record_type=RecordType.EXAMPLE):
    """Build each row's message with TensorFlow's classes."""
    messages = []
    for row in batch.to_pylist():
        flat, deep = tf.train.Features(), tf.train.FeatureLists()
        for field in batch.schema:
            value = row[field.name]
            if value is None:
                continue
            if pa.types.is_list(field.type) and pa.types.is_list(field.type.value_type):
                deep.feature_list[field.name].feature.extend(feature(field.type, v) for v in value)
                deep.feature_list[field.name].SetInParent()
            else:
                flat.feature[field.name].CopyFrom(feature(field.type, value))
        if record_type is SEQUENCE:
            messages.append(tf.train.SequenceExample(context=flat, feature_lists=deep))
        else:
            messages.append(tf.train.Example(features=flat))
    return messages


def serialised(messages):
    return pa.array([m.SerializeToString() for m in messages], pa.large_binary())


@quick
@given(batches(deepest=1))
def test_example_equals_tensorflow_both_ways(batch):
    expected = as_messages(batch)
    ours = [tf.train.Example.FromString(r.as_py()) for r in encode_records(batch)]
    assert ours == expected
    assert decode_records(serialised(expected), batch.schema).equals(batch)


@quick
@given(batches(deepest=2))
def test_sequence_example_equals_tensorflow_both_ways(batch):
    expected = as_messages(batch, SEQUENCE)
    ours = encode_records(batch, SEQUENCE)
    assert [tf.train.SequenceExample.FromString(r.as_py()) for r in ours] == expected
    assert decode_records(serialised(expected), batch.schema, SEQUENCE).equals(batch)


@quick
@given(batches(deepest=1), st.integers(0, 6), st.integers(0, 6))
def test_slices_encode_as_their_rows(batch, first, count):
    piece = batch.slice(first, count)
    whole = encode_records(batch).to_pylist()
    assert encode_records(piece).to_pylist() == whole[first : first + count]


def test_many_values_and_long_bytes_survive():
    rng = np.random.default_rng(1)
    lists = [rng.integers(-(2**62), 2**62, n).tolist() for n in (0, 1, 3000, 2)]
    batch = pa.record_batch({"i": lists, "b": [b"", b"x" * 100_000, b"y" * 127, b"z" * 128]})
    records = encode_records(batch)
    assert [tf.train.Example.FromString(r.as_py()) for r in records] == as_messages(batch)
    assert decode_records(records, batch.schema).equals(batch)


def test_parse_example_of_tensorflow_reads_ours():
    batch = pa.record_batch({"a": [1, -2], "f": [[1.5, 2.5], []], "s": ["x", "ü"]})
    records = encode_records(batch).to_pylist()
    spec = {
        "a": tf.io.FixedLenFeature([], tf.int64),
        "f": tf.io.VarLenFeature(tf.float32),
        "s": tf.io.FixedLenFeature([], tf.string),
    }
    parsed = tf.io.parse_example(records, spec)
    assert parsed["a"].numpy().tolist() == [1, -2]
    assert parsed["f"].values.numpy().tolist() == [1.5, 2.5]
    assert parsed["s"].numpy().tolist() == [b"x", "ü".encode()]


def test_keys_are_sorted_so_that_bytes_do_not_depend_on_column_order():
    one = pa.record_batch({"b": [1], "a": ["x"], "é": [2.0]})
    other = one.select(["é", "a", "b"])
    assert encode_records(one).equals(encode_records(other))


# Hand-built messages: what a legal writer may do and TensorFlow's own does not.


def varint(value):
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number, payload):
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def unknown(rng):
    """A field no message has: of any wire type, groups with nested groups included."""
    return rng.choice(
        [
            b"",
            field(15, b"junk"),
            varint(16 << 3) + varint(2**63),
            varint(17 << 3 | 1) + bytes(8),
            varint(18 << 3 | 5) + bytes(4),
            b"\x9b\x01" + field(1, b"in group") + b"\xa3\x01\xa4\x01" + b"\x9c\x01",
        ]
    )


def loose_list(rng, number, values):
    """A list of ints (3) or floats (2), each value packed or not, as chance will have it."""
    out = b""
    while values:
        some, values = values[: rng.randint(1, 3)], values[rng.randint(1, 3) :]
        if number == 2:
            raw = [np.float32(v).tobytes() for v in some]
            out += (
                field(1, b"".join(raw))
                if rng.random() < 0.5
                else b"".join(b"\x0d" + r for r in raw)
            )
        else:
            raw = [varint(v) for v in some]
            out += (
                field(1, b"".join(raw))
                if rng.random() < 0.5
                else b"".join(b"\x08" + r for r in raw)
            )
        out += unknown(rng)
    return out


def loose_feature(rng, number):
    values = [rng.randint(-(2**63), 2**63 - 1) for _ in range(rng.randint(0, 5))]
    if number == 1:
        return b"".join(field(1, str(v).encode()) + unknown(rng) for v in values)
    if number == 2:
        values = [v / 3 for v in values]
    return loose_list(rng, number, values)


def loose_example(rng):
    """An Example with shuffled, repeated and split parts and unknown fields everywhere."""
    maps = b""
    for _ in range(rng.randint(0, 6)):
        name, number = rng.choice([("b", 1), ("f", 2), ("i", 3), ("ü", 3)])
        key = field(1, name.encode())
        numbers = [number] if rng.random() < 0.7 else [rng.choice([1, 2, 3]), number]
        lists = [field(n, loose_feature(rng, n)) for n in numbers]
        value = b"".join(field(2, one) for one in lists)
        if rng.random() < 0.5:
            value = field(2, b"".join(lists))
        parts = [key, value] if rng.random() < 0.5 else [value, key]
        # No unknown field here: Python's protobuf (upb) then drops the whole entry.
        entry = field(1, b"".join(parts))
        maps += field(1, entry + unknown(rng)) + unknown(rng)
    return maps


LOOSE = pa.schema(
    [
        ("i", pa.list_(pa.int64())),
        ("f", pa.list_(pa.float32())),
        ("b", pa.list_(pa.binary())),
        ("ü", pa.list_(pa.int64())),
    ]
)
LOOSE_FIELDS = {"i": "int64_list", "f": "float_list", "b": "bytes_list", "ü": "int64_list"}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 2**32), min_size=1, max_size=8))
def test_any_legal_layout_reads_as_protobuf_reads_it(seeds):
    raw = [loose_example(random.Random(seed)) for seed in seeds]
    got = decode_records(pa.array(raw, pa.large_binary()), LOOSE).to_pylist()
    for row, data in zip(got, raw, strict=True):
        features = tf.train.Example.FromString(data).features.feature
        expected = {
            name: list(getattr(features[name], kind).value)
            if name in features and features[name].WhichOneof("kind")
            else None
            for name, kind in LOOSE_FIELDS.items()
        }
        assert row == expected


def test_unknown_field_in_a_map_entry_is_skipped():
    entry = field(1, b"i") + field(9, b"junk") + field(2, field(3, field(1, b"\x05")))
    raw = [field(1, field(1, entry)), field(1, field(1, unknown(random.Random(5)) + entry))]
    rows = decode_records(pa.array(raw, pa.large_binary()), LOOSE).to_pylist()
    assert [row["i"] for row in rows] == [[5], [5]]


def test_truncated_messages_are_refused_wherever_protobuf_refuses_them():
    batch = pa.record_batch({"i": [[1, 300]], "b": [[b"xy"]], "f": [[1.0]], "ü": [[2]]})
    whole = encode_records(batch)[0].as_py()
    refused = 0
    for cut in range(1, len(whole)):
        with pytest.raises(RecordError, match="malformed protobuf"):
            decode_records(pa.array([whole, whole[:cut]], pa.large_binary()), LOOSE)
        refused += 1
    assert refused == len(whole) - 1


@pytest.mark.parametrize(
    ("inner", "what"),
    [
        (field(3, field(1, b"\x80")), "varint that is cut"),
        (field(3, field(1, b"\x80" * 10 + b"\x01")), "too long"),
        (field(2, field(1, b"\0\0\0")), "multiple of 4"),
        (b"\x1e", "wire type"),
        (b"\x02", "tag"),
        (b"\x0c", "never began"),
        (b"\x0b", "never ends"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "past the end"),
    ],
)
def test_malformed_feature_names_record(inner, what):
    bad = field(1, field(1, field(1, b"i") + field(2, inner)))
    good = tf.train.Example().SerializeToString()
    name = {2: "f", 3: "i"}.get(inner[0] >> 3, "i")
    bad = bad.replace(b"\x0a\x01i", b"\x0a\x01" + name.encode())
    with pytest.raises(RecordError, match=what) as error:
        decode_records(pa.array([good, good, bad], pa.large_binary()), LOOSE)
    assert error.value.row == 2


# What does not fit.


def encoded(**columns):
    return encode_records(pa.record_batch(columns))


@pytest.mark.parametrize(
    ("columns", "schema", "words"),
    [
        ({"a": [1, 2**40]}, [("a", pa.int32())], ["'a'", "int32", str(2**40)]),
        ({"a": [[1], [2, 300]]}, [("a", pa.list_(pa.int8()))], ["'a'", "int8", "300"]),
        ({"a": [1, 2]}, [("a", pa.bool_())], ["'a'", "bool", "2"]),
        ({"a": [b"x", b"\xff"]}, [("a", pa.string())], ["'a'", "string", "binary"]),
        ({"a": [1, 2]}, [("a", pa.float32())], ["'a'", "float_list", "int64_list"]),
        ({"a": [[1], [1, 2]]}, [("a", pa.int64())], ["'a'", "a single value", "array"]),
    ],
)
def test_value_that_does_not_fit_the_schema_is_named(columns, schema, words):
    with pytest.raises(RecordError) as error:
        decode_records(encoded(**columns), pa.schema(schema))
    assert error.value.row == (0 if "float_list" in words else 1)
    assert all(word in error.value.reason for word in words), error.value.reason


def test_missing_feature_is_null_unless_the_schema_forbids_it():
    records = encoded(a=[1, None])
    wanted = pa.schema([("a", pa.int64()), ("b", pa.list_(pa.string()))])
    assert decode_records(records, wanted).to_pylist() == [
        {"a": 1, "b": None},
        {"a": None, "b": None},
    ]
    with pytest.raises(RecordError, match="'a': expected a value"):
        decode_records(records, pa.schema([pa.field("a", pa.int64(), nullable=False)]))


def test_feature_in_the_other_section_is_an_error_not_a_null():
    records = encode_records(pa.record_batch({"c": [[1]], "d": [[[1]]]}), SEQUENCE)
    for name, kind in (("c", pa.list_(pa.list_(pa.int64()))), ("d", pa.list_(pa.int64()))):
        with pytest.raises(RecordError, match="found it in the"):
            decode_records(records, pa.schema([(name, kind)]), SEQUENCE)


def test_floats_narrow_and_overflow_is_refused():
    values = [0.1, float("inf"), float("-inf"), None]
    batch = pa.record_batch({"x": pa.array(values, pa.float64())})
    back = decode_records(encode_records(batch), batch.schema)["x"].to_pylist()
    assert back == [float(np.float32(0.1)), float("inf"), float("-inf"), None]
    with pytest.raises(TFRecordError, match=r"'x'.*float32.*1e\+300"):
        encoded(x=[1e300])
    nan = decode_records(encoded(x=[float("nan")]), batch.schema)["x"][0].as_py()
    assert np.isnan(nan)


def test_decimal_goes_through_float():
    batch = pa.record_batch({"d": pa.array(["1.25", None, "-3.50"]).cast(pa.decimal128(10, 2))})
    assert decode_records(encode_records(batch), batch.schema).equals(batch)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([0], pa.date32()), ["'c'", "date", "unix_date"]),
        (pa.array([0], pa.timestamp("us")), ["'c'", "timestamp", "cast"]),
        (pa.array([{"x": 1}]), ["'c'", "struct", "select its parts"]),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), ["'c'", "map"]),
        (pa.array([[[1]]]), ["'c'", "SequenceExample"]),
        (pa.array([[1, None]]), ["'c'", "null array element"]),
    ],
)
def test_column_that_has_no_feature_is_named(column, words):
    with pytest.raises(TFRecordError) as error:
        encode_records(pa.record_batch({"c": column}))
    assert all(word in str(error.value) for word in words), error.value


def test_null_inner_list_and_triple_nesting_are_refused():
    with pytest.raises(TFRecordError, match=r"'c'.*null"):
        encode_records(pa.record_batch({"c": [[[1], None]]}), SEQUENCE)
    with pytest.raises(TFRecordError, match=r"'c'.*at most 2"):
        encode_records(pa.record_batch({"c": [[[[1]]]]}), SEQUENCE)


def test_byte_array_passes_bytes_through():
    batch = pa.record_batch({"byteArray": [b"", b"\x00\xff", b"x" * 500]})
    records = encode_records(batch, RecordType.BYTE_ARRAY)
    assert records.to_pylist() == [b"", b"\x00\xff", b"x" * 500]
    assert decode_records(records, batch.schema, RecordType.BYTE_ARRAY).equals(batch)
    with pytest.raises(TFRecordError, match="null record"):
        encode_records(
            pa.record_batch({"byteArray": pa.array([None], pa.binary())}), RecordType.BYTE_ARRAY
        )
    with pytest.raises(TFRecordError, match="byteArray"):
        encode_records(pa.record_batch({"other": [b"x"]}), RecordType.BYTE_ARRAY)
