"""How columns map to TensorFlow features: record types, feature kinds and nesting.

The mapping is that of the JVM connectors (linkedin/spark-tfrecord and
tensorflow/ecosystem/spark-tensorflow-connector, README "Supported data types"):

==============================================  ===============================
Arrow type (Spark type)                         Feature
==============================================  ===============================
bool, int8, int16, int32, int64                 ``int64_list`` of one value
float32, float64, decimal                       ``float_list`` of one value
string, binary                                  ``bytes_list`` of one value
list of those (``array<T>``)                    the same list, of any length
list of list (``array<array<T>>``)              ``feature_lists`` entry, only in
                                                ``SequenceExample``
==============================================  ===============================

float64 and decimal are narrowed to float32, the only float that TensorFlow features have.

Messages: https://github.com/tensorflow/tensorflow/blob/v2.20.0/tensorflow/core/example/
(feature.proto, example.proto).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

import pyarrow as pa

from training.tfrecord.errors import TFRecordError

BYTE_ARRAY_COLUMN = "byteArray"
"""The one column of record type ``ByteArray``, named as the JVM connectors name it."""


class RecordType(StrEnum):
    """What each record of a file is; values are those of the ``recordType`` option."""

    EXAMPLE = "Example"
    SEQUENCE = "SequenceExample"
    BYTE_ARRAY = "ByteArray"

    @classmethod
    def parse(cls, text: str) -> RecordType:
        """Return the record type with this name.

        Raises:
            TFRecordError: there is none.
        """
        for member in cls:
            if member.value == text:
                return member
        raise TFRecordError(
            f"option recordType: expected one of {', '.join(cls)}, got {text!r}: correct it."
        )


class Kind(IntEnum):
    """Feature kinds; values are the field numbers of the ``Feature.kind`` oneof."""

    UNSET = 0
    BYTES = 1
    FLOAT = 2
    INT64 = 3

    @property
    def label(self) -> str:
        """The name of the list in feature.proto."""
        return ("no list", "bytes_list", "float_list", "int64_list")[self]


@dataclass(frozen=True)
class Column:
    """Where a column lives in a record.

    Attributes:
        name: column name and feature key.
        kind: which list holds its values.
        depth: 0 for a scalar, 1 for a list, 2 for a list of lists (``feature_lists``).
        leaf: Arrow type of one value.
        type: Arrow type of the whole column.
        nullable: whether a record may lack the feature.
    """

    name: str
    kind: Kind
    depth: int
    leaf: pa.DataType
    type: pa.DataType
    nullable: bool


def columns_of(schema: pa.Schema, record_type: RecordType) -> list[Column]:
    """Map every field of an Arrow schema.

    Args:
        schema: the columns to write or to read.
        record_type: what each record is.

    Returns:
        One ``Column`` per field, in schema order.

    Raises:
        TFRecordError: a column's type has no feature, two columns have one name, or the
            schema does not fit the record type.
    """
    columns = [_column(field, record_type) for field in schema]
    names = [column.name for column in columns]
    for name in names:
        if names.count(name) > 1:
            raise TFRecordError(
                f"column {name!r}: expected unique names, got it {names.count(name)} times: "
                "rename the columns, feature keys must be unique."
            )
    wanted = (BYTE_ARRAY_COLUMN, Kind.BYTES, 0)
    got = [(column.name, column.kind, column.depth) for column in columns]
    if record_type is RecordType.BYTE_ARRAY and got != [wanted]:
        raise TFRecordError(
            f"recordType ByteArray: expected exactly one binary column {BYTE_ARRAY_COLUMN!r}, got "
            f"{', '.join(f'{f.name}: {f.type}' for f in schema)}: select and rename the column."
        )
    return columns


def _column(field: pa.Field, record_type: RecordType) -> Column:
    leaf, depth = field.type, 0
    while pa.types.is_list(leaf) or pa.types.is_large_list(leaf):
        leaf, depth = leaf.value_type, depth + 1
    kind = _kind(leaf)
    if kind is Kind.UNSET:
        raise unsupported(field.name, str(field.type))
    deepest = 2 if record_type is RecordType.SEQUENCE else 1
    if depth > deepest:
        raise TFRecordError(
            f"column {field.name!r}: expected at most {deepest} level(s) of array in recordType "
            f"{record_type}, got {depth} ({field.type}): flatten the arrays"
            + (", or write recordType SequenceExample." if depth == 2 else ".")
        )
    return Column(field.name, kind, depth, leaf, field.type, field.nullable)


def _kind(leaf: pa.DataType) -> Kind:
    checks = pa.types
    if checks.is_boolean(leaf) or checks.is_signed_integer(leaf):
        return Kind.INT64
    if checks.is_float32(leaf) or checks.is_float64(leaf) or checks.is_decimal(leaf):
        return Kind.FLOAT
    if checks.is_string(leaf) or checks.is_binary(leaf):
        return Kind.BYTES
    if checks.is_large_string(leaf) or checks.is_large_binary(leaf):
        return Kind.BYTES
    return Kind.UNSET


def unsupported(name: str, type_name: str) -> TFRecordError:
    """Return the error for a column whose type has no TensorFlow feature."""
    temporal = any(word in type_name for word in ("date", "time", "interval", "duration"))
    advice = (
        "cast it to bigint (such as unix_micros(c) or unix_date(c)) or to string"
        if temporal and "<" not in type_name
        else "select its parts as columns of their own, or encode it, such as to_json(c)"
    )
    return TFRecordError(
        f"column {name!r}: type {type_name} has no TensorFlow feature; expected boolean, an "
        f"integer, float, double, decimal, string, binary or arrays of these: {advice}."
    )
