"""Arrow batches to serialised ``tf.train.Example`` / ``SequenceExample`` records, vectorised.

A record is described by *pieces*. A piece stands for ``n`` byte strings, one per item: it
knows all their sizes and can write all of them with a few numpy calls. Pieces nest as the
messages do, so sizes are computed bottom-up, the output is allocated once, and every tag,
length and payload is scattered to its place top-down.

Bytes are deterministic: features of a record are in the order of their UTF-8 keys.
Messages: feature.proto and example.proto of TensorFlow (see ``features``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.tfrecord.errors import TFRecordError
from training.tfrecord.features import Column, Kind, RecordType, columns_of
from training.tfrecord.wire import (
    Bytes,
    Ints,
    Words,
    copy_ranges,
    offsets_of,
    put_varints,
    varint_sizes,
)

_FIRST, _SECOND = b"\x0a", b"\x12"
"""Tags of length-delimited fields 1 and 2."""

_KIND_TAGS = {Kind.BYTES: b"\x0a", Kind.FLOAT: b"\x12", Kind.INT64: b"\x1a"}


class _Piece(Protocol):
    """``n`` byte strings: ``sizes`` has shape ``(n,)``; ``write`` puts string i at ``at[i]``."""

    sizes: Ints

    def write(self, out: Bytes, at: Ints) -> None: ...


class _Constant:
    """The same bytes for every item."""

    def __init__(self, value: bytes, count: int) -> None:
        self._value = np.frombuffer(value, dtype=np.uint8)
        self.sizes = np.full(count, len(value), dtype=np.int64)

    def write(self, out: Bytes, at: Ints) -> None:
        for shift, byte in enumerate(self._value):
            out[at + shift] = byte


class _Slices:
    """Slices of a flat buffer, one per item."""

    def __init__(self, source: Bytes, offsets: Ints) -> None:
        self._source, self._starts = source, offsets[:-1]
        self.sizes = np.diff(offsets)

    def write(self, out: Bytes, at: Ints) -> None:
        copy_ranges(out, at, self._source, self._starts, self.sizes)


class _Varints:
    """One varint per item."""

    def __init__(self, values: Words) -> None:
        self._values = values
        self.sizes = varint_sizes(values)

    def write(self, out: Bytes, at: Ints) -> None:
        put_varints(out, at, self._values)


class _Delimited:
    """A length-delimited field: one-byte tag, length, then the inner string."""

    def __init__(self, tag: bytes, inner: _Piece) -> None:
        self._tag, self._inner = tag[0], inner
        self._lengths = inner.sizes.astype(np.uint64)
        self._head = 1 + varint_sizes(self._lengths)
        self.sizes = self._head + inner.sizes

    def write(self, out: Bytes, at: Ints) -> None:
        out[at] = self._tag
        put_varints(out, at + 1, self._lengths)
        self._inner.write(out, at + self._head)


class _Joined:
    """The strings of several pieces one after the other, item by item."""

    def __init__(self, parts: Sequence[_Piece], count: int) -> None:
        self._parts = parts
        self.sizes = np.zeros(count, dtype=np.int64)
        for part in parts:
            self.sizes += part.sizes

    def write(self, out: Bytes, at: Ints) -> None:
        for part in self._parts:
            part.write(out, at)
            at = at + part.sizes


class _Repeated:
    """Item i is the join of inner strings ``offsets[i]`` to ``offsets[i + 1]``."""

    def __init__(self, inner: _Piece, offsets: Ints) -> None:
        self._inner, self._counts = inner, np.diff(offsets)
        self._before = offsets_of(inner.sizes)
        self._offsets = offsets
        self.sizes = np.diff(self._before[offsets])

    def write(self, out: Bytes, at: Ints) -> None:
        shift = np.repeat(at - self._before[self._offsets[:-1]], self._counts)
        self._inner.write(out, shift + self._before[:-1])


class _Some:
    """Inner strings for the items listed in ``index``, nothing for the others."""

    def __init__(self, inner: _Piece, index: Ints, count: int) -> None:
        self._inner, self._index = inner, index
        self.sizes = np.zeros(count, dtype=np.int64)
        self.sizes[index] = inner.sizes

    def write(self, out: Bytes, at: Ints) -> None:
        self._inner.write(out, at[self._index])


def encode_records(
    batch: pa.RecordBatch, record_type: RecordType = RecordType.EXAMPLE
) -> pa.LargeBinaryArray:
    """Serialise every row of a batch.

    Args:
        batch: ``n`` rows of columns with the types ``features`` lists. A null is a feature
            that is absent from its record; an empty list is a feature with an empty list.
        record_type: the message to write; ``ByteArray`` passes the one column through.

    Returns:
        ``n`` serialised messages, without TFRecord framing.

    Raises:
        TFRecordError: a column's type has no feature, a list holds a null, or a double or
            decimal is beyond the range of float32.
    """
    columns = columns_of(batch.schema, record_type)
    if record_type is RecordType.BYTE_ARRAY:
        if batch.column(0).null_count:
            raise _null_error(columns[0].name, "record", "drop such rows")
        return batch.column(0).cast(pa.large_binary())
    rows = batch.num_rows
    ordered = sorted(zip(columns, batch.columns, strict=True), key=lambda c: c[0].name.encode())
    flat = [_entry(column, values) for column, values in ordered if column.depth < 2]
    parts = [_Delimited(_FIRST, _Joined(flat, rows))]
    if record_type is RecordType.SEQUENCE:
        deep = [_entry(column, values) for column, values in ordered if column.depth == 2]
        parts.append(_Delimited(_SECOND, _Joined(deep, rows)))
    return _render(_Joined(parts, rows))


def _render(message: _Piece) -> pa.LargeBinaryArray:
    offsets = offsets_of(message.sizes)
    out = np.empty(offsets[-1], dtype=np.uint8)
    message.write(out, offsets[:-1])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(out)]
    return pa.Array.from_buffers(pa.large_binary(), len(message.sizes), buffers)


def _entry(column: Column, values: pa.Array) -> _Piece:
    """Return the map entry (key, then feature or feature list) of each row that has one."""
    present = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False))
    given = values.drop_null()
    key = _render(_Delimited(_FIRST, _Constant(column.name.encode(), 1)))[0].as_py()
    body = _feature_list(column, given) if column.depth == 2 else _feature(column, given)
    entry = _Joined([_Constant(key, len(given)), _Delimited(_SECOND, body)], len(given))
    return _Some(_Delimited(_FIRST, entry), present, len(values))


def _feature_list(column: Column, values: pa.Array) -> _Piece:
    inner, offsets = _unnest(column.name, values)
    return _Repeated(_Delimited(_FIRST, _feature(column, inner)), offsets)


def _feature(column: Column, values: pa.Array) -> _Piece:
    """Return ``Feature`` messages for values without nulls, one per scalar or list."""
    if column.depth:
        leaves, offsets = _unnest(column.name, values)
    else:
        leaves, offsets = values, np.arange(len(values) + 1)
    body = {Kind.BYTES: _bytes_list, Kind.FLOAT: _float_list, Kind.INT64: _int64_list}[column.kind]
    return _Delimited(_KIND_TAGS[column.kind], body(column.name, leaves, offsets))


def _unnest(name: str, values: pa.Array) -> tuple[pa.Array, Ints]:
    """Return the elements of lists (themselves not null) and the lists' offsets."""
    inner = pc.list_flatten(values)
    if inner.null_count:
        raise _null_error(
            name, "array element", "drop them, such as filter(c, x -> x is not null), or coalesce"
        )
    counts = pc.list_value_length(values).cast(pa.int64()).to_numpy()
    return inner, offsets_of(counts)


def _null_error(name: str, what: str, advice: str) -> TFRecordError:
    return TFRecordError(
        f"column {name!r}: expected no null {what}, got one: a TensorFlow list cannot hold "
        f"null, {advice}."
    )


def _bytes_list(name: str, leaves: pa.Array, offsets: Ints) -> _Piece:
    source, bounds = binary_parts(leaves.cast(pa.large_binary()))
    return _Repeated(_Delimited(_FIRST, _Slices(source, bounds)), offsets)


def binary_parts(values: pa.LargeBinaryArray) -> tuple[Bytes, Ints]:
    """Return the flat bytes of a null-free array and its ``n + 1`` offsets into them."""
    _, bounds, data = values.buffers()
    if not len(values):
        return np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=np.int64)
    every = np.frombuffer(bounds, dtype=np.int64)
    source = np.frombuffer(data if data is not None else b"", dtype=np.uint8)
    return source, every[values.offset : values.offset + len(values) + 1]


def _float_list(name: str, leaves: pa.Array, offsets: Ints) -> _Piece:
    wide = leaves.cast(pa.float64()).to_numpy() if not pa.types.is_float32(leaves.type) else None
    if wide is None:
        narrow = leaves.to_numpy()
    else:
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float32)
        beyond = np.isinf(narrow) & np.isfinite(wide)
        if beyond.any():
            raise TFRecordError(
                f"column {name!r}: expected values within float32 (+-3.4028e38), got "
                f"{wide[beyond][0]}: TensorFlow features hold float32 only, scale the column."
            )
    filled, bounds = _filled(offsets)
    payload = _Slices(np.ascontiguousarray(narrow, dtype="<f4").view(np.uint8), bounds * 4)
    return _Some(_Delimited(_FIRST, payload), filled, len(offsets) - 1)


def _int64_list(_name: str, leaves: pa.Array, offsets: Ints) -> _Piece:
    values = leaves.cast(pa.int64()).to_numpy().view(np.uint64)
    filled, bounds = _filled(offsets)
    payload = _Repeated(_Varints(values), bounds)
    return _Some(_Delimited(_FIRST, payload), filled, len(offsets) - 1)


def _filled(offsets: Ints) -> tuple[Ints, Ints]:
    """Return which lists are not empty, and the offsets of these: protobuf packs only them."""
    filled = np.flatnonzero(np.diff(offsets))
    return filled, np.append(offsets[filled], offsets[-1])
