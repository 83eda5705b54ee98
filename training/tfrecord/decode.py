"""Serialised ``tf.train.Example`` / ``SequenceExample`` records to Arrow columns, vectorised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from training.tfrecord.errors import RecordError
from training.tfrecord.features import Column, Kind, RecordType, columns_of
from training.tfrecord.framing import read_windows
from training.tfrecord.parse import (
    CONTEXT,
    FEATURE_LISTS,
    Entries,
    read_kinds,
    read_lists,
    split_records,
)
from training.tfrecord.scan import Fields, scan
from training.tfrecord.wire import Bytes, Ints, Mask, offsets_of


def decode_file(
    path: str | Path, schema: pa.Schema, record_type: RecordType = RecordType.EXAMPLE
) -> Iterator[pa.RecordBatch]:
    """Read a TFRecord file, gzip if its name ends in ``.gz``, in bounded memory.

    Args:
        path: the file.
        schema: the columns wanted; see ``decode_records``.
        record_type: what the records are.

    Yields:
        The rows in order, in batches with exactly this schema.

    Raises:
        TFRecordError: the file is damaged or does not fit the schema; the message has the
            file, the record and its byte offset.
    """
    for window in read_windows(path):
        try:
            yield decode_records(window.records, schema, record_type)
        except RecordError as error:
            raise window.located(error, path) from error


def decode_records(
    records: pa.LargeBinaryArray,
    schema: pa.Schema,
    record_type: RecordType = RecordType.EXAMPLE,
) -> pa.RecordBatch:
    """Parse serialised messages into the columns of a schema.

    Args:
        records: ``n`` serialised messages, without nulls.
        schema: the columns wanted. A scalar column takes features with at most one value
            (none reads as null); an absent feature, or one with no list set, reads as null.
        record_type: what the records are; ``ByteArray`` passes them through.

    Returns:
        ``n`` rows with exactly this schema.

    Raises:
        RecordError: a record is malformed, a feature has another kind or more values than its
            column, a value does not fit the column's type, or a column that is not nullable
            has no value.
        TFRecordError: a column's type has no feature.
    """
    columns = columns_of(schema, record_type)
    if record_type is RecordType.BYTE_ARRAY:
        return pa.record_batch([records.cast(schema.field(0).type)], schema=schema)
    buf, sections = split_records(records, record_type)
    arrays = [_column(buf, sections, column, len(records)) for column in columns]
    return pa.record_batch(arrays, schema=schema)


def _column(buf: Bytes, sections: dict[int, Entries], column: Column, rows: int) -> pa.Array:
    section = FEATURE_LISTS if column.depth == 2 else CONTEXT
    entry = sections[section].last_by_row(column.name.encode(), rows)
    _reject_other_section(sections, section, column, rows)
    found = np.flatnonzero(entry >= 0)
    parts = sections[section].pieces(entry[found])
    present = np.zeros(rows, dtype=np.bool_)
    counts = np.zeros(rows, dtype=np.int64)
    if column.depth == 2:
        present[found] = True
        features = scan(buf, parts.spans).messages(1)
        np.add.at(counts, features.spans.row, 1)
        lengths, values, _ = _values(buf, features.unmerged(), features.spans.row, column)
        values = _nest(column.type.value_type, lengths, values, np.ones(len(lengths), np.bool_))
    else:
        counts[found], values, present[found] = _values(buf, parts, found, column)
    if column.depth == 0:
        present = counts == 1
        _reject(counts > 1, np.arange(rows), column, "a single value", "a list; declare array<..>")
    if not column.nullable:
        _reject(~present, np.arange(rows), column, "a value (not nullable)", "none")
    if column.depth:
        return _nest(column.type, counts, values, present)
    return values if present.all() else _scatter(values, present)


def _values(buf: Bytes, parts: Fields, rows: Ints, column: Column) -> tuple[Ints, pa.Array, Mask]:
    """Read the features of one column; ``rows`` is the record of each feature.

    Returns:
        How many values each feature has, all values as the column's leaf type, and which
        features have a list set.
    """
    kind, lists = read_kinds(buf, parts, len(rows))
    wrong = np.flatnonzero((kind != column.kind) & (kind != Kind.UNSET))
    if len(wrong):
        found = Kind(int(kind[wrong[0]])).label
        _reject(kind == kind[wrong[0]], rows, column, column.kind.label, found)
    counts, values = read_lists(buf, column.kind, lists, len(rows))
    return counts, _cast(values, column, np.repeat(rows, counts)), kind != Kind.UNSET


def _reject(bad: Mask, rows: Ints, column: Column, expected: str, found: str) -> None:
    """Raise for the first record with a bad feature, if there is one."""
    if bad.any():
        raise RecordError(
            int(rows[bad].min()),
            f"feature {column.name!r}: expected {expected} for column type {column.type}, found "
            f"{found}: correct the schema that is read with, or write the data again.",
        )


def _reject_other_section(
    sections: dict[int, Entries], section: int, column: Column, rows: int
) -> None:
    """Refuse a feature that is there, but not where a column of this depth is looked for."""
    names = {CONTEXT: "the context", FEATURE_LISTS: "the feature_lists (array<array<..>>)"}
    for other in sections.keys() - {section}:
        misplaced = sections[other].last_by_row(column.name.encode(), rows) >= 0
        wanted, found = f"it in {names[section]}", f"it in {names[other]}"
        _reject(misplaced, np.arange(rows), column, wanted, found)


def _cast(values: pa.Array, column: Column, rows: Ints) -> pa.Array:
    """Cast decoded values to the leaf type; ``rows`` is the record of each value."""
    try:
        return _cast_exactly(values, column.leaf)
    except pa.ArrowInvalid as error:
        first = _first_failing(values, column.leaf)
        value = values[first].as_py()
        raise RecordError(
            int(rows[first]),
            f"feature {column.name!r}: expected values that fit column type {column.type}, found "
            f"{str(value)[:80]}: declare a wider type (bigint for integers, double for numbers, "
            f"binary for bytes that are not UTF-8). {error}",
        ) from error


def _cast_exactly(values: pa.Array, leaf: pa.DataType) -> pa.Array:
    if pa.types.is_boolean(leaf):
        numbers = values.to_numpy()
        if ((numbers != 0) & (numbers != 1)).any():
            raise pa.ArrowInvalid("A boolean is stored as 0 or 1.")
    return values.cast(leaf)


def _first_failing(values: pa.Array, leaf: pa.DataType) -> int:
    """Return the index of the first value that does not cast, by bisection."""
    good, failing = 0, len(values)
    while failing - good > 1:
        middle = (good + failing) // 2
        try:
            _cast_exactly(values[good:middle], leaf)
            good = middle
        except pa.ArrowInvalid:
            failing = middle
    return good


def _nest(kind: pa.DataType, counts: Ints, values: pa.Array, present: Mask) -> pa.Array:
    """Return a list array with ``counts[i]`` values in item i; null where not present."""
    large = pa.types.is_large_list(kind)
    bounds = pa.array(offsets_of(counts), pa.int64() if large else pa.int32())
    build = pa.LargeListArray if large else pa.ListArray
    absent = None if present.all() else pa.array(~present)
    return build.from_arrays(bounds, values, type=kind, mask=absent)


def _scatter(values: pa.Array, present: Mask) -> pa.Array:
    """Return one item per row: the values in order where present, null elsewhere."""
    index = np.cumsum(present) - 1
    return values.take(pa.array(index, mask=~present))
