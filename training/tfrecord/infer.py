"""Schema inference from TFRecord files that nobody left a schema for.

Every record of every file is read, not a sample, and what is learnt is merged with
operations that do not depend on order, so the result does not depend on the order or the
partitioning of the files:

* a feature is a scalar only if some record has one value and no record has more; an empty
  list then reads as null. A feature that only ever has empty lists is a list;
* a feature whose kind is set nowhere is a list of binary, always null;
* ``bytes_list`` is string if every value is valid UTF-8, as the JVM connectors always
  assume (TensorFlowInferSchema.scala), and binary otherwise, where they would damage it;
* columns are sorted by name, and all may be null.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from training.tfrecord.errors import RecordError, TFRecordError
from training.tfrecord.features import BYTE_ARRAY_COLUMN, Kind, RecordType
from training.tfrecord.framing import Window, read_windows
from training.tfrecord.parse import FEATURE_LISTS, Entries, read_kinds, read_lists, split_records
from training.tfrecord.scan import scan
from training.tfrecord.wire import Bytes


@dataclass(frozen=True)
class _Seen:
    """What is known of one feature.

    Attributes:
        kind: the kind set in any record, or ``UNSET``.
        deep: whether it is a feature list.
        most: the most values in one ``Feature``.
        text: whether all bytes values are valid UTF-8.
        where: a file that has it.
    """

    kind: Kind
    deep: bool
    most: int
    text: bool
    where: Path

    def merged(self, name: str, other: _Seen) -> _Seen:
        if self.deep != other.deep:
            raise _conflict(name, self.where, "the context", other.where, "the feature_lists")
        if self.kind != other.kind and Kind.UNSET not in (self.kind, other.kind):
            raise _conflict(name, self.where, self.kind.label, other.where, other.kind.label)
        known = other if self.kind is Kind.UNSET else self
        most = max(self.most, other.most)
        return _Seen(known.kind, self.deep, most, self.text and other.text, known.where)

    def arrow_type(self) -> pa.DataType:
        leaf = {
            Kind.INT64: pa.int64(),
            Kind.FLOAT: pa.float32(),
            Kind.BYTES: pa.string() if self.text else pa.binary(),
            Kind.UNSET: pa.binary(),
        }[self.kind]
        listed = _list_of(leaf)
        if self.deep:
            return _list_of(listed)
        return leaf if self.most == 1 else listed


def infer_schema(files: Iterable[Path], record_type: RecordType) -> pa.Schema:
    """Infer the columns that can hold every record of the files.

    Args:
        files: TFRecord files; all are read in full, in this process.
        record_type: what their records are.

    Returns:
        The schema; see the module's docstring for the rules.

    Raises:
        TFRecordError: a file is corrupt, or a feature has two kinds.
    """
    if record_type is RecordType.BYTE_ARRAY:
        return pa.schema([(BYTE_ARRAY_COLUMN, pa.binary())])
    seen: dict[str, _Seen] = {}
    for path in files:
        for window in read_windows(path):
            for name, new in _summary(path, window, record_type):
                seen[name] = seen[name].merged(name, new) if name in seen else new
    return pa.schema([(name, seen[name].arrow_type()) for name in sorted(seen)])


def _summary(path: Path, window: Window, record_type: RecordType) -> Iterator[tuple[str, _Seen]]:
    try:
        buf, sections = split_records(window.records, record_type)
        for section, entries in sections.items():
            for key in entries.by_key:
                yield _name(path, key), _look(path, buf, entries, (key, section == FEATURE_LISTS))
    except RecordError as error:
        raise window.located(error, path) from error


def _look(path: Path, buf: Bytes, entries: Entries, wanted: tuple[bytes, bool]) -> _Seen:
    key, deep = wanted
    last = entries.last_by_row(key, int(entries.row[-1]) + 1)
    chosen = last[last >= 0]
    pieces, count = entries.pieces(chosen), len(chosen)
    if deep:
        pieces = scan(buf, pieces.spans).messages(1).unmerged()
        count = len(pieces.spans)
    kinds, lists = read_kinds(buf, pieces, count)
    found = [Kind(int(kind)) for kind in np.unique(kinds) if kind]
    if len(found) > 1:
        raise _conflict(_name(path, key), path, found[0].label, path, found[1].label)
    if not found:
        return _Seen(Kind.UNSET, deep, most=0, text=True, where=path)
    counts, values = read_lists(buf, found[0], lists, count)
    text = found[0] is not Kind.BYTES or _is_text(values)
    return _Seen(found[0], deep, int(counts.max(initial=0)), text, path)


def _is_text(values: pa.LargeBinaryArray) -> bool:
    try:
        values.cast(pa.large_string())
    except pa.ArrowInvalid:
        return False
    return True


def _name(path: Path, key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError as error:
        raise TFRecordError(
            f"{path}: expected feature keys in UTF-8, as protobuf demands of map<string, ..>, got "
            f"{key!r}: read the file with recordType ByteArray or write it again."
        ) from error


def _conflict(name: str, path: Path, one: str, other_path: Path, other: str) -> TFRecordError:
    return TFRecordError(
        f"feature {name!r}: expected one kind in all records, found {one} in {path} and {other} in "
        f"{other_path}: load these files separately, each with its schema."
    )


def _list_of(leaf: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", leaf))
