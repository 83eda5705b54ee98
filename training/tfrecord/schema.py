"""Spark schemas: to and from Arrow, and the ``_schema.json`` sidecar of written directories."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyspark.sql import types as t

from training.tfrecord.errors import TFRecordError
from training.tfrecord.features import RecordType, unsupported
from training.tfrecord.paths import SIDECAR

_ARROW_LEAVES: dict[type[t.DataType], pa.DataType] = {
    t.BooleanType: pa.bool_(),
    t.ByteType: pa.int8(),
    t.ShortType: pa.int16(),
    t.IntegerType: pa.int32(),
    t.LongType: pa.int64(),
    t.FloatType: pa.float32(),
    t.DoubleType: pa.float64(),
    t.StringType: pa.string(),
    t.BinaryType: pa.binary(),
}


def to_arrow(schema: t.StructType) -> pa.Schema:
    """Return the Arrow schema in which Spark exchanges such columns with Python.

    Raises:
        TFRecordError: a column's type has no TensorFlow feature; names the column and type.
    """
    return pa.schema(
        [
            pa.field(field.name, _to_arrow(field.name, field.dataType), field.nullable)
            for field in schema.fields
        ]
    )


def _to_arrow(name: str, kind: t.DataType) -> pa.DataType:
    if isinstance(kind, t.ArrayType):
        element = _to_arrow(name, kind.elementType)
        return pa.list_(pa.field("element", element, kind.containsNull))
    if isinstance(kind, t.DecimalType):
        return pa.decimal128(kind.precision, kind.scale)
    if type(kind) not in _ARROW_LEAVES:
        raise unsupported(name, kind.simpleString())
    return _ARROW_LEAVES[type(kind)]


def to_spark(schema: pa.Schema) -> t.StructType:
    """Return the Spark schema of inferred columns; the inverse of ``to_arrow``."""
    leaves = {arrow: spark for spark, arrow in _ARROW_LEAVES.items()}

    def convert(kind: pa.DataType) -> t.DataType:
        if pa.types.is_list(kind):
            return t.ArrayType(convert(kind.value_type))
        return leaves[kind]()

    return t.StructType([t.StructField(field.name, convert(field.type)) for field in schema])


@dataclass(frozen=True)
class Sidecar:
    """What a directory was written with.

    Attributes:
        schema: all columns, nullable, as Spark's own file sources make them: any feature may
            be absent from a record.
        record_type: what each record is.
    """

    schema: t.StructType
    record_type: RecordType

    @classmethod
    def of(cls, schema: t.StructType, record_type: RecordType) -> Sidecar:
        """Return the sidecar for data with this schema."""
        return cls(_nullable(schema), record_type)

    @classmethod
    def read(cls, directory: Path) -> Sidecar | None:
        """Return the directory's sidecar, or None if it has none.

        Raises:
            TFRecordError: it is there, but is not one.
        """
        path = directory / SIDECAR
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            schema = t.StructType.fromJson(content["schema"])
            return cls(schema, RecordType.parse(content["recordType"]))
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError) as error:
            raise TFRecordError(
                f"{path}: expected JSON with 'recordType' and a Spark 'schema', got {error!r}: "
                "remove the file (the schema is then inferred from the data) or restore it."
            ) from error

    def text(self) -> str:
        """Return the content of the sidecar file; equal for equal schemas."""
        content = {"recordType": self.record_type.value, "schema": self.schema.jsonValue()}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    def check_append(self, new: Sidecar, directory: Path) -> None:
        """Refuse an append that the schema at hand cannot describe.

        Columns may be missing from the new data: they read as null.

        Raises:
            TFRecordError: other record type, a new column, or another type of a column.
        """
        if new.record_type is not self.record_type:
            raise TFRecordError(
                f"{directory}: expected recordType {self.record_type} as of the data there, got "
                f"{new.record_type}: append the same record type, or write elsewhere."
            )
        old = {field.name: field.dataType for field in self.schema.fields}
        for field in new.schema.fields:
            if field.name not in old:
                raise TFRecordError(
                    f"{directory}: column {field.name!r} is not in the schema of the data there "
                    f"({', '.join(old)}): drop the column, or overwrite."
                )
            if field.dataType != old[field.name]:
                raise TFRecordError(
                    f"{directory}: column {field.name!r}: expected type "
                    f"{old[field.name].simpleString()} as of the data there, got "
                    f"{field.dataType.simpleString()}: cast the column, or overwrite."
                )


def common_sidecar(directories: list[Path]) -> Sidecar | None:
    """Return what describes the data of all these directories; None if one has no sidecar.

    Raises:
        TFRecordError: they differ in record type or in the type of a column.
    """
    found = [(directory, Sidecar.read(directory)) for directory in directories]
    common: Sidecar | None = None
    for directory, sidecar in found:
        if sidecar is None:
            return None
        if common is None:
            common = sidecar
            continue
        known = set(common.schema.names)
        added = [field for field in sidecar.schema.fields if field.name not in known]
        common = Sidecar(t.StructType([*common.schema.fields, *added]), common.record_type)
        common.check_append(sidecar, directory)
    return common


def _nullable(schema: t.StructType) -> t.StructType:
    def convert(kind: t.DataType) -> t.DataType:
        if isinstance(kind, t.ArrayType):
            return t.ArrayType(convert(kind.elementType))
        return kind

    return t.StructType(
        [t.StructField(field.name, convert(field.dataType)) for field in schema.fields]
    )
