"""Vectorised protobuf wire primitives: varints and ragged byte ranges on numpy arrays.

Every function works on whole columns at once. A *ragged range* is a pair of equally long
arrays ``(starts, lengths)`` in bytes that selects one slice per item of a flat buffer.

Wire format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Ints: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint64]
Mask: TypeAlias = NDArray[np.bool_]

MAX_VARINT_BYTES = 10
"""Longest legal varint: 64 bits in groups of seven."""

_SLICE_COPY_BYTES = 96
"""Mean range length from which one slice copy per range beats an index array per byte."""


def varint_sizes(values: Words) -> Ints:
    """Return the encoded size of each value, shape ``(n,)``, 1 to 10 bytes."""
    sizes = np.ones(len(values), dtype=np.int64)
    top = int(values.max()) if len(values) else 0
    for shift in range(7, 64, 7):
        if top >> shift == 0:
            break
        sizes += values >= np.uint64(1 << shift)
    return sizes


def put_varints(out: Bytes, at: Ints, values: Words) -> None:
    """Write ``values[i]`` as a varint that begins at ``out[at[i]]``."""
    while len(values):
        more = values >= np.uint64(0x80)
        out[at] = (values.astype(np.uint8) & np.uint8(0x7F)) | (more.astype(np.uint8) << 7)
        keep = np.flatnonzero(more)
        values = values[keep] >> np.uint64(7)
        at = at[keep] + 1


def get_varints(buf: Bytes, at: Ints, end: Ints) -> tuple[Words, Ints, Mask]:
    """Read one varint at each ``at[i]``, not reading at or past ``end[i]``.

    Args:
        buf: bytes to read from.
        at: shape ``(n,)``, where each varint begins.
        end: shape ``(n,)``, the exclusive end of the message each varint is in.

    Returns:
        The values, the position after each varint, and a mask of the items that have no
        complete varint of at most ten bytes there (their value and position are meaningless).
    """
    bad = at >= end
    if bad.all():
        return np.zeros(len(at), dtype=np.uint64), at, bad
    byte = buf[np.minimum(at, len(buf) - 1)]
    values, after = (byte & np.uint8(0x7F)).astype(np.uint64), at + 1
    live = np.flatnonzero((byte >= 0x80) & ~bad)
    for step in range(1, MAX_VARINT_BYTES):
        cut = after[live] >= end[live]
        bad[live[cut]] = True
        live = live[~cut]
        if not len(live):
            return values, after, bad
        byte = buf[after[live]]
        values[live] |= (byte & np.uint8(0x7F)).astype(np.uint64) << np.uint64(7 * step)
        after[live] += 1
        live = live[byte >= 0x80]
    bad[live] = True
    return values, after, bad


def unpack_varints(buf: Bytes, starts: Ints, lengths: Ints) -> tuple[Words, Ints, Mask]:
    """Decode ranges that hold varints back to back (packed fields, or one bare varint).

    Args:
        buf: bytes the ranges are in.
        starts: shape ``(n,)``, first byte of each range.
        lengths: shape ``(n,)``, bytes in each range.

    Returns:
        All values in order, how many each range holds (shape ``(n,)``), and a mask of the
        ranges which do not end at the end of a varint or have one longer than ten bytes.
    """
    stream = gather(buf, starts, lengths)
    bounds = offsets_of(lengths)
    last = stream < 0x80
    ends = np.flatnonzero(last)
    counts = np.diff(np.searchsorted(ends, bounds))
    bad = np.zeros(len(starts), dtype=np.bool_)
    filled = np.flatnonzero(lengths)
    bad[filled] = ~last[bounds[filled + 1] - 1]
    sizes = np.diff(ends, prepend=-1)
    at = ends - sizes + 1
    too_long = at[sizes > MAX_VARINT_BYTES]
    bad[np.searchsorted(bounds, too_long, side="right") - 1] = True
    values = (stream[at] & np.uint8(0x7F)).astype(np.uint64)
    live = np.flatnonzero(sizes > 1)
    at = at[live]
    for step in range(1, MAX_VARINT_BYTES):
        at += 1
        byte = stream[at]
        values[live] |= (byte & np.uint8(0x7F)).astype(np.uint64) << np.uint64(7 * step)
        more = np.flatnonzero(byte >= 0x80)
        live, at = (live, at) if len(more) == len(live) else (live[more], at[more])
    return values, counts, bad


def offsets_of(counts: Ints) -> Ints:
    """Return the ``n + 1`` exclusive running sums of ``counts``, beginning with 0."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def ragged_positions(starts: Ints, lengths: Ints) -> Ints:
    """Return every position in the ranges, one after the other: ``lengths.sum()`` items."""
    offsets = offsets_of(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])


def copy_ranges(out: Bytes, at: Ints, source: Bytes, starts: Ints, lengths: Ints) -> None:
    """Copy each range of ``source`` to ``out``, range ``i`` beginning at ``out[at[i]]``."""
    if _are_short(lengths):
        out[ragged_positions(at, lengths)] = gather(source, starts, lengths)
        return
    for to, begin, length in zip(at.tolist(), starts.tolist(), lengths.tolist(), strict=True):
        out[to : to + length] = source[begin : begin + length]


def gather(source: Bytes, starts: Ints, lengths: Ints) -> Bytes:
    """Return the ranges of ``source`` joined into one array of ``lengths.sum()`` bytes."""
    if _are_short(lengths):
        return source.take(ragged_positions(starts, lengths))
    out = np.empty(lengths.sum(), dtype=np.uint8)
    copy_ranges(out, offsets_of(lengths)[:-1], source, starts, lengths)
    return out


def _are_short(lengths: Ints) -> bool:
    """Tell whether an index array, 8 bytes for each byte moved, is worth it."""
    return int(lengths.sum()) < _SLICE_COPY_BYTES * len(lengths)
