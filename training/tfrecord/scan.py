"""Lock-step scanner of protobuf messages: one numpy step per field, over all messages.

All messages of a level advance together: step *k* reads the *k*-th field of every message
that still has one. The cost is the number of steps (fields in the longest message), not the
number of messages. Known and unknown fields, in any order, are reported; groups (the
deprecated wire types 3 and 4) are skipped.

Wire format: https://protobuf.dev/programming-guides/encoding/#structure
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from training.tfrecord.errors import RecordError
from training.tfrecord.wire import Bytes, Ints, Mask, Words, get_varints, offsets_of

VARINT, FIXED64, LEN, START_GROUP, END_GROUP, FIXED32 = range(6)

_FIXED_SIZES = np.array([0, 8, 0, 0, 0, 4])
"""Bytes of a value, by wire type, where it has neither a length nor an end mark."""

_MAX_TAG = (1 << 32) - 1


@dataclass(frozen=True)
class Spans:
    """Byte ranges of ``n`` messages (or values) in one buffer.

    Attributes:
        start: shape ``(n,)``, first byte.
        end: shape ``(n,)``, the byte after the last.
        row: shape ``(n,)``, index of the record each is in; ascending.
    """

    start: Ints
    end: Ints
    row: Ints

    def __len__(self) -> int:
        """Return ``n``."""
        return len(self.start)

    @property
    def lengths(self) -> Ints:
        """Bytes in each range, shape ``(n,)``."""
        return self.end - self.start

    def take(self, index: Ints | Mask) -> Spans:
        """Return the selected ranges."""
        return Spans(self.start[index], self.end[index], self.row[index])


@dataclass(frozen=True)
class Fields:
    """The fields of many messages, ordered by message and then as on the wire.

    Attributes:
        spans: where the values are: the payload of a LEN field, else the bare value's bytes.
        parent: shape ``(m,)``, index of the message each field is in; ascending.
        number: shape ``(m,)``, field numbers.
        wire: shape ``(m,)``, wire types (never a group).
    """

    spans: Spans
    parent: Ints
    number: Ints
    wire: Ints

    def take(self, index: Ints | Mask) -> Fields:
        """Return the selected fields."""
        return Fields(
            self.spans.take(index), self.parent[index], self.number[index], self.wire[index]
        )

    def messages(self, number: int) -> Fields:
        """Return the LEN fields with this number."""
        wanted = (self.number == number) & (self.wire == LEN)
        return self if wanted.all() else self.take(wanted)

    def unmerged(self) -> Fields:
        """Return the same fields, each taken for the only piece of a message of its own."""
        return replace(self, parent=np.arange(len(self.spans)))


def malformed(row: int, what: str) -> NoReturn:
    """Raise the error for a record that is not a well-formed protobuf message.

    Raises:
        RecordError: always.
    """
    raise RecordError(
        row,
        f"malformed protobuf: {what}. The record's CRC is right, so it was written like this: "
        "check that recordType names the message type that the files hold.",
    )


def scan(buf: Bytes, messages: Spans) -> Fields:
    """Split every message into its fields.

    Args:
        buf: the bytes all messages are in.
        messages: where each message is.

    Returns:
        All fields outside groups, known and unknown.

    Raises:
        RecordError: a message is cut inside a field, or has an illegal tag.
    """
    steps: list[Fields] = []
    ranks: list[Ints] = []
    at = messages.start.copy()
    depth, seen = np.zeros((2, len(messages)), dtype=np.int64)
    live = np.flatnonzero(at < messages.end)
    while len(live):
        step, after = _read_fields(buf, messages, live, at[live])
        at[live] = after
        depth[live] += (step.wire == START_GROUP).astype(np.int64) - (step.wire == END_GROUP)
        _reject(messages, live, depth[live] < 0, "a group ends that never began")
        inside = (depth[live] > 0) | (step.wire == END_GROUP)
        steps.append(step.take(~inside) if inside.any() else step)
        ranks.append(seen[steps[-1].parent])
        seen[steps[-1].parent] += 1
        live = live[after < messages.end[live]]
    _reject(messages, np.arange(len(messages)), depth > 0, "a group never ends")
    return _by_message(steps, _joined(ranks), offsets_of(seen))


def _read_fields(buf: Bytes, messages: Spans, live: Ints, at: Ints) -> tuple[Fields, Ints]:
    """Read one field at ``at`` of each live message; return it and the position after it."""
    end = messages.end[live]
    tags, at, bad = get_varints(buf, at, end)
    _reject(messages, live, bad | (tags > _MAX_TAG) | (tags < 8), "no valid field tag")
    number = (tags >> np.uint64(3)).astype(np.int64)
    wire = (tags & np.uint64(7)).astype(np.int64)
    _reject(messages, live, wire > FIXED32, "wire type 6 or 7 does not exist")
    values, after, bad = get_varints(buf, at, end)
    is_len, is_varint = wire == LEN, wire == VARINT
    _reject(messages, live, bad & (is_len | is_varint), "a varint is cut or longer than ten bytes")
    start = np.where(is_len, after, at)
    size = np.where(is_len, _clipped(values), np.where(is_varint, after - at, _FIXED_SIZES[wire]))
    _reject(messages, live, size > end - start, "a field reaches past the end of its message")
    stop = start + size
    return Fields(Spans(start, stop, messages.row[live]), live, number, wire), stop


def _clipped(lengths: Words) -> Ints:
    """Return lengths as int64; absurd ones become 2**62, which is past any buffer's end."""
    return np.minimum(lengths, np.uint64(1 << 62)).astype(np.int64)


def _reject(messages: Spans, index: Ints, bad: Mask, what: str) -> None:
    if bad.any():
        malformed(int(messages.row[index[bad]].min()), what)


def _by_message(steps: list[Fields], rank: Ints, bounds: Ints) -> Fields:
    """Bring the fields of all steps into message order; ``rank`` is their place in theirs."""
    if len(steps) == 1:
        return steps[0]
    parent = _joined([step.parent for step in steps])
    order = np.empty(len(parent), dtype=np.int64)
    order[bounds[parent] + rank] = np.arange(len(parent))
    spans = Spans(
        _joined([step.spans.start for step in steps]),
        _joined([step.spans.end for step in steps]),
        _joined([step.spans.row for step in steps]),
    )
    number, wire = _joined([step.number for step in steps]), _joined([step.wire for step in steps])
    return Fields(spans, parent, number, wire).take(order)


def _joined(parts: list[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
