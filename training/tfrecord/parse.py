"""Parser of ``tf.train.Example`` / ``SequenceExample`` messages, vectorised over records.

Follows protobuf's parsing rules: keys in any order, the last of equal keys wins, a message
given in parts is merged, unknown fields are skipped, numeric lists are accepted packed and
unpacked (https://protobuf.dev/programming-guides/encoding/#last-one-wins).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from training.tfrecord.encode import binary_parts
from training.tfrecord.features import Kind, RecordType
from training.tfrecord.scan import FIXED32, LEN, VARINT, Fields, Spans, malformed, scan
from training.tfrecord.wire import (
    Bytes,
    Ints,
    Mask,
    gather,
    offsets_of,
    ragged_positions,
    unpack_varints,
)

CONTEXT, FEATURE_LISTS = 1, 2
"""Field numbers of the two maps of a record; ``Example`` has only the first."""


@dataclass(frozen=True)
class Entries:
    """Map entries (one key with its feature or feature list) of many records.

    Attributes:
        by_key: for each feature key, the indices of its entries; ascending.
        row: shape ``(m,)``, record of each entry; ascending.
        values: the pieces of the entries' values, ordered by entry.
        bounds: shape ``(m + 1,)``, where the pieces of each entry begin in ``values``.
    """

    by_key: dict[bytes, Ints]
    row: Ints
    values: Fields
    bounds: Ints

    def last_by_row(self, key: bytes, rows: int) -> Ints:
        """Return, for each of ``rows`` records, its last entry with this key, or -1."""
        last = np.full(rows, -1, dtype=np.int64)
        index = self.by_key.get(key)
        if index is not None:
            last[self.row[index]] = index
        return last

    def pieces(self, chosen: Ints) -> Fields:
        """Return the pieces of the chosen entries; ``parent`` is the place in ``chosen``."""
        counts = self.bounds[chosen + 1] - self.bounds[chosen]
        index = ragged_positions(self.bounds[chosen], counts)
        parent = np.repeat(np.arange(len(chosen)), counts)
        return replace(self.values.take(index), parent=parent)


def split_records(
    records: pa.LargeBinaryArray, record_type: RecordType
) -> tuple[Bytes, dict[int, Entries]]:
    """Find the map entries of every record.

    Returns:
        The flat bytes, and the entries by section: ``CONTEXT`` (the features of an
        ``Example``) and, in a ``SequenceExample``, ``FEATURE_LISTS``.

    Raises:
        RecordError: a record is malformed.
    """
    buf, bounds = binary_parts(records)
    whole = Spans(bounds[:-1], bounds[1:], np.arange(len(records)))
    top = scan(buf, whole)
    numbers = (CONTEXT, FEATURE_LISTS) if record_type is RecordType.SEQUENCE else (CONTEXT,)
    return buf, {number: _entries(buf, top.messages(number).spans) for number in numbers}


def _entries(buf: Bytes, maps: Spans) -> Entries:
    entries = scan(buf, maps).messages(1).spans
    fields = scan(buf, entries)
    keys = fields.messages(1)
    # An entry without key has the default key, "": an empty range.
    start, end = np.zeros((2, len(entries)), dtype=np.int64)
    start[keys.parent] = keys.spans.start
    end[keys.parent] = keys.spans.end
    values = fields.messages(2)
    bounds = np.searchsorted(values.parent, np.arange(len(entries) + 1))
    return Entries(_grouped(_binary(buf, start, end - start)), entries.row, values, bounds)


def _grouped(keys: pa.LargeBinaryArray) -> dict[bytes, Ints]:
    """Return the indices at which each distinct key stands."""
    encoded = keys.dictionary_encode()
    codes = encoded.indices.to_numpy()
    groups = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    return dict(zip(encoded.dictionary.to_pylist(), groups, strict=False))


def _binary(buf: Bytes, starts: Ints, lengths: Ints) -> pa.LargeBinaryArray:
    data, offsets = gather(buf, starts, lengths), offsets_of(lengths)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_binary(), len(starts), buffers)


def read_kinds(buf: Bytes, parts: Fields, count: int) -> tuple[Ints, Fields]:
    """Parse ``Feature`` messages.

    Args:
        buf: the records' bytes.
        parts: the pieces of the features; ``parent`` is the feature.
        count: how many features there are.

    Returns:
        The ``Kind`` set in each feature (shape ``(count,)``) and the pieces of the lists of
        that kind, ``parent`` being the feature.
    """
    fields = scan(buf, parts.spans)
    lists = fields.take((fields.wire == LEN) & (fields.number >= 1) & (fields.number <= 3))
    owner = parts.parent[lists.parent]
    kind = np.zeros(count, dtype=np.int64)
    kind[owner] = lists.number
    # Setting one member of the oneof clears the others: keep what follows the last change.
    cleared = np.full(count, -1, dtype=np.int64)
    other = np.flatnonzero(lists.number != kind[owner])
    cleared[owner[other]] = other
    kept = np.arange(len(owner)) > cleared[owner]
    return kind, replace(lists, parent=owner).take(kept)


def read_lists(buf: Bytes, kind: Kind, lists: Fields, count: int) -> tuple[Ints, pa.Array]:
    """Parse the lists of one kind.

    Args:
        buf: the records' bytes.
        kind: what all these lists are.
        lists: the pieces of the lists; ``parent`` is the feature.
        count: how many features there are.

    Returns:
        How many values each feature has (shape ``(count,)``) and all values in order: int64,
        float32 or large_binary.

    Raises:
        RecordError: a packed list is malformed.
    """
    wire = {Kind.BYTES: LEN, Kind.FLOAT: FIXED32, Kind.INT64: VARINT}[kind]
    fields = scan(buf, lists.spans)
    fields = fields.take((fields.number == 1) & ((fields.wire == wire) | (fields.wire == LEN)))
    starts, lengths = fields.spans.start, fields.spans.lengths
    if kind is Kind.BYTES:
        held, values = np.ones(len(starts), dtype=np.int64), _binary(buf, starts, lengths)
    elif kind is Kind.FLOAT:
        _reject(fields, lengths % 4 != 0, "a packed float list is not a multiple of 4 bytes")
        held, values = lengths // 4, pa.array(gather(buf, starts, lengths).view("<f4"))
    else:
        words, held, bad = unpack_varints(buf, starts, lengths)
        _reject(fields, bad, "a packed int64 list holds a varint that is cut or too long")
        values = pa.array(words.view(np.int64))
    counts = np.zeros(count, dtype=np.int64)
    np.add.at(counts, lists.parent[fields.parent], held)
    return counts, values


def _reject(fields: Fields, bad: Mask, what: str) -> None:
    if bad.any():
        malformed(int(fields.spans.row[bad].min()), what)
