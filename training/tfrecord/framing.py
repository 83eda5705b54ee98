"""The TFRecord container: length and CRC framing, gzip, and reading in bounded windows.

A file is a series of records, each framed as: length (uint64), masked CRC32C of the length
(uint32), data, masked CRC32C of the data (uint32), all little-endian. A ``.gz`` file is the
gzip of such a file. Format: https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import IO

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.tfrecord.encode import binary_parts
from training.tfrecord.errors import RecordError, TFRecordError
from training.tfrecord.wire import Ints, offsets_of

_HEADER, _FOOTER = 12, 4
_LENGTH = struct.Struct("<Q")

WINDOW_BYTES = 8 << 20
"""Bytes read at a time. A longer record makes the window as long as that record."""

WINDOW_RECORDS = 8192
"""Most records in a window, so that decoded columns are bounded as well."""

_INFLATE_BYTES = 1 << 20

_DAMAGED = "the file is damaged or is no TFRecord file; restore it or write it again."


@dataclass(frozen=True)
class Window:
    """Consecutive records of one file.

    Attributes:
        records: the records' data, CRCs checked.
        first: index in the file of the first of them, from 0.
        offsets: shape ``(n,)``, byte in the (uncompressed) file where each record begins.
    """

    records: pa.LargeBinaryArray
    first: int
    offsets: Ints

    def located(self, error: RecordError, path: str | Path) -> TFRecordError:
        """Return the error of one of these records with the file and the place in it."""
        return TFRecordError(
            f"{path}: record {self.first + error.row} at byte {self.offsets[error.row]}: "
            f"{error.reason}"
        )


def is_gzip(path: Path) -> bool:
    """Tell whether a file is gzip: by its extension, as Hadoop codecs are chosen."""
    return path.suffix == ".gz"


def masked_crcs(pieces: list[bytes]) -> NDArray[np.uint32]:
    """Return the masked CRC32C of each byte string.

    The mask is that of https://github.com/tensorflow/tensorflow/blob/v2.20.0/tensorflow/core/
    lib/hash/crc32c.h: CRCs of data that contains CRCs are weak without it.
    """
    crcs = np.fromiter(map(google_crc32c.value, pieces), dtype=np.uint32, count=len(pieces))
    return ((crcs >> np.uint32(15)) | (crcs << np.uint32(17))) + np.uint32(0xA282EAD8)


def frame(records: pa.LargeBinaryArray) -> bytes:
    """Return the records in TFRecord framing."""
    source, bounds = binary_parts(records)
    pieces = _slices(source.tobytes(), bounds[:-1], bounds[1:])
    lengths = np.diff(bounds).astype("<u8").tobytes()
    headers = np.empty(len(pieces), dtype=[("length", "<u8"), ("crc", "<u4")])
    headers["length"] = np.diff(bounds)
    eights = np.arange(0, len(lengths), 8)
    headers["crc"] = masked_crcs(_slices(lengths, eights, eights + 8))
    footers = masked_crcs(pieces).astype("<u4")
    framed = zip(headers.view("V12").tolist(), pieces, footers.view("V4").tolist(), strict=True)
    return b"".join(chain.from_iterable(framed))


def write_records(path: str | Path, batches: Iterable[pa.LargeBinaryArray]) -> int:
    """Write a TFRecord file, gzip if its name ends in ``.gz``, and force it to disk.

    The bytes depend on the records alone: a gzip header holds neither time nor name.

    Args:
        path: the file to create or replace.
        batches: records, in order.

    Returns:
        How many records were written.

    Raises:
        OSError: the disk is full or the file cannot be written; it is removed again.
    """
    path = Path(path)
    count = 0
    try:
        with path.open("wb") as raw:
            with _compressed(raw) if is_gzip(path) else nullcontext(raw) as out:
                for records in batches:
                    out.write(frame(records))
                    count += len(records)
            raw.flush()
            os.fsync(raw.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        why = f"{error.strerror or error} while writing this file, which was removed"
        raise OSError(error.errno, why, str(path)) from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return count


def _compressed(raw: IO[bytes]) -> gzip.GzipFile:
    return gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0)


def read_windows(path: str | Path) -> Iterator[Window]:
    """Read a TFRecord file, gzip if its name ends in ``.gz``, in windows of bounded size.

    Args:
        path: the file.

    Yields:
        Its records in order, at most ``WINDOW_RECORDS`` at a time.

    Raises:
        TFRecordError: the file is corrupt or truncated. The message has the file, the byte
            offset in the uncompressed stream, what was expected and what was found.
        OSError: the file cannot be read.
    """
    path = Path(path)
    parts: list[bytes] = []
    place, needed = _Place(path, offset=0, index=0), _HEADER
    with path.open("rb") as raw:
        for part in _inflated(path, raw) if is_gzip(path) else _read_parts(raw):
            parts.append(part)
            if sum(map(len, parts)) < needed:
                continue
            data = b"".join(parts)
            begins, end = _walk(data)
            _check_headers(place, data, begins)
            whole = begins if end <= len(data) else begins[:-1]
            used = end if end <= len(data) else begins[-1]
            needed = max(end - used, _HEADER)
            yield from _checked_windows(place, data, [*whole, used])
            place = _Place(path, place.offset + used, place.index + len(whole))
            parts = [data[used:]]
    left = sum(map(len, parts))
    if left:
        raise TFRecordError(
            f"{path}: truncated TFRecord: record {place.index} at byte {place.offset} needs "
            f"{needed} bytes, found {left} before the end of the file: {_DAMAGED}"
        )


def _read_parts(raw: IO[bytes]) -> Iterator[bytes]:
    while part := raw.read(WINDOW_BYTES):
        yield part


def _inflated(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """Yield the uncompressed stream of a gzip file of one or more members."""
    offset, member = 0, zlib.decompressobj(wbits=31)
    pending, ended = raw.read(_INFLATE_BYTES), False
    while pending:
        try:
            part = member.decompress(pending, WINDOW_BYTES)
        except zlib.error as error:
            raise TFRecordError(
                f"{path}: corrupt gzip after byte {offset} of the uncompressed stream: expected "
                f"valid deflate data and checksum, found: {error}: {_DAMAGED}"
            ) from error
        if part:
            yield part
        offset += len(part)
        ended = member.eof
        pending = member.unused_data.lstrip(b"\0") if ended else member.unconsumed_tail
        member = zlib.decompressobj(wbits=31) if ended else member
        pending = pending or raw.read(_INFLATE_BYTES)
    if not ended:
        raise TFRecordError(
            f"{path}: truncated gzip: expected the end-of-stream marker after byte {offset} of the "
            f"uncompressed stream, found the end of the file: {_DAMAGED}"
        )


@dataclass(frozen=True)
class _Place:
    """Where the bytes at hand begin: offset in the uncompressed file, index of the record."""

    path: Path
    offset: int
    index: int

    def corrupt(self, record: int, begin: int, what: str) -> TFRecordError:
        return TFRecordError(
            f"{self.path}: corrupt TFRecord: record {self.index + record} at byte "
            f"{self.offset + begin}: {what}: {_DAMAGED}"
        )


def _walk(data: bytes) -> tuple[list[int], int]:
    """Return where each record begins whose header is in ``data``, and where the last ends."""
    begins, at = [], 0
    while at + _HEADER <= len(data):
        begins.append(at)
        at += _HEADER + _LENGTH.unpack_from(data, at)[0] + _FOOTER
    return begins, at


def _check_headers(place: _Place, data: bytes, begins: list[int]) -> None:
    """Refuse a length whose CRC is wrong, before anything trusts that length."""
    found = masked_crcs([data[at : at + 8] for at in begins])
    stored = _crcs_at(data, [at + 8 for at in begins])
    bad = np.flatnonzero(found != stored)
    if len(bad):
        first = int(bad[0])
        hint = ""
        if place.offset == 0 and data[:2] == b"\x1f\x8b":
            hint = " (the file begins like gzip: give it the extension .gz)"
        raise place.corrupt(
            first, begins[first], _mismatch("length", stored[first], found[first]) + hint
        )


def _crcs_at(data: bytes, places: list[int]) -> NDArray[np.uint32]:
    return np.frombuffer(b"".join([data[at : at + 4] for at in places]), dtype="<u4")


def _mismatch(what: str, stored: np.uint32, found: np.uint32) -> str:
    return (
        f"expected the {what} to have the masked CRC32C stored with it, {int(stored):#010x}, "
        f"found {int(found):#010x}"
    )


def _checked_windows(place: _Place, data: bytes, begins: list[int]) -> Iterator[Window]:
    """Yield the records between consecutive ``begins``, once their data CRCs are checked."""
    for first in range(0, len(begins) - 1, WINDOW_RECORDS):
        bounds = begins[first : first + WINDOW_RECORDS + 1]
        pieces = [data[at + _HEADER : to - _FOOTER] for at, to in pairwise(bounds)]
        stored, found = _crcs_at(data, [to - _FOOTER for to in bounds[1:]]), masked_crcs(pieces)
        bad = np.flatnonzero(found != stored)
        if len(bad):
            at = int(bad[0])
            raise place.corrupt(first + at, bounds[at], _mismatch("data", stored[at], found[at]))
        yield Window(_binary(pieces), place.index + first, place.offset + np.array(bounds[:-1]))


def _binary(pieces: list[bytes]) -> pa.LargeBinaryArray:
    offsets = offsets_of(np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces)))
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(pieces))]
    return pa.Array.from_buffers(pa.large_binary(), len(pieces), buffers)


def _slices(data: bytes, starts: Ints, ends: Ints) -> list[bytes]:
    return [data[at:to] for at, to in zip(starts.tolist(), ends.tolist(), strict=True)]
