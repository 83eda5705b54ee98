"""The Spark data source ``tfrecord``: what Spark calls, on the driver and in its tasks.

Options: ``path``; ``recordType`` (``Example``, the default, ``SequenceExample`` or
``ByteArray``); on writes ``codec`` (``none``, ``gzip`` or
``org.apache.hadoop.io.compress.GzipCodec``), on reads the extension ``.gz`` decides.

Spark supports only the modes append and overwrite for Python data sources, and neither is its
default: say ``.mode("overwrite")`` or ``.mode("append")``. It does not pass on
``partitionBy``: write one directory per value. A file is one partition of a read.

API: https://spark.apache.org/docs/latest/api/python/tutorial/sql/python_data_source.html
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql.datasource import (
    DataSource,
    DataSourceArrowWriter,
    DataSourceReader,
    InputPartition,
    WriterCommitMessage,
)
from pyspark.sql.types import StructType

from training.tfrecord.commit import StagedPart, WriteJob
from training.tfrecord.decode import decode_file
from training.tfrecord.encode import encode_records
from training.tfrecord.errors import TFRecordError
from training.tfrecord.features import RecordType, columns_of
from training.tfrecord.framing import write_records
from training.tfrecord.infer import infer_schema
from training.tfrecord.paths import data_files, local_path
from training.tfrecord.schema import Sidecar, common_sidecar, to_arrow, to_spark

_EXTENSIONS = {
    "none": ".tfrecord",
    "gzip": ".tfrecord.gz",
    "org.apache.hadoop.io.compress.gzipcodec": ".tfrecord.gz",
}

_ENCODE_BYTES = 16 << 20
"""Arrow bytes encoded at a time: numpy needs several times as much on the way."""


class TFRecordDataSource(DataSource):
    """``format("tfrecord")``."""

    @classmethod
    def name(cls) -> str:
        """Return the short name of the format."""
        return "tfrecord"

    def schema(self) -> StructType:
        """Return the schema the data was written with, else infer it from all records.

        The sidecar counts if every directory has one; inference is as ``infer`` describes,
        and reads every file in the driver's process: for large foreign data, give a schema.

        Raises:
            TFRecordError: see ``paths.data_files``, ``schema.common_sidecar`` and ``infer``.
        """
        directories, files = data_files(self.options.get("path"))
        sidecar = common_sidecar(directories)
        record_type = self._record_type(sidecar)
        if sidecar is not None and sidecar.record_type is record_type:
            return sidecar.schema
        return to_spark(infer_schema(files, record_type))

    def reader(self, schema: StructType) -> DataSourceReader:
        """Plan a read of columns with this schema; columns the files lack read as null."""
        directories, files = data_files(self.options.get("path"))
        asked = "recordType" in self.options
        record_type = self._record_type(None if asked else common_sidecar(directories))
        wanted = to_arrow(schema)
        columns_of(wanted, record_type)
        return TFRecordReader(files, wanted, record_type)

    def writer(self, schema: StructType, overwrite: bool) -> DataSourceArrowWriter:
        """Plan a write, refusing on the driver what no task could write.

        Raises:
            TFRecordError: an option, a path, a column type, or an append that does not fit.
        """
        codec = self.options.get("codec", "none")
        if codec.lower() not in _EXTENSIONS:
            raise TFRecordError(f"option codec: expected none or gzip, got {codec!r}: correct it.")
        target = local_path(self.options.get("path")).resolve()
        if target.exists() and not target.is_dir():
            raise TFRecordError(
                f"{target}: expected a directory to write to, found a file: remove it, or write to "
                "another path."
            )
        sidecar = Sidecar.of(schema, self._record_type(None))
        columns_of(to_arrow(schema), sidecar.record_type)
        present = None if overwrite else Sidecar.read(target)
        if present is not None:
            present.check_append(sidecar, target)
        job = WriteJob(target, uuid.uuid4().hex, overwrite)
        job.prepare()
        return TFRecordWriter(job, sidecar, _EXTENSIONS[codec.lower()])

    def _record_type(self, sidecar: Sidecar | None) -> RecordType:
        default = RecordType.EXAMPLE if sidecar is None else sidecar.record_type
        return RecordType.parse(self.options.get("recordType", default.value))


class TFRecordReader(DataSourceReader):
    """Reads each file as one partition."""

    def __init__(self, files: Sequence[Path], schema: pa.Schema, record_type: RecordType) -> None:
        """Remember what to read."""
        self._files, self._schema, self._record_type = files, schema, record_type

    def partitions(self) -> Sequence[InputPartition]:
        """Return one partition per file."""
        return [InputPartition(str(path)) for path in self._files]

    def read(self, partition: InputPartition) -> Iterator[pa.RecordBatch]:
        """Read one file in bounded memory; Spark calls this in a task.

        Raises:
            TFRecordError: the file is damaged or does not fit the schema.
        """
        # Spark stands in a partition without value when there are no files at all.
        if partition.value is not None:
            yield from decode_file(partition.value, self._schema, self._record_type)


@dataclass
class _Written(WriterCommitMessage):
    """What one task has staged; nothing if its partition was empty."""

    part: StagedPart | None


class TFRecordWriter(DataSourceArrowWriter):
    """Writes each partition to one file; see ``commit`` for what becomes visible when."""

    def __init__(self, job: WriteJob, sidecar: Sidecar, extension: str) -> None:
        """Remember what to write, and where."""
        self._job, self._sidecar, self._extension = job, sidecar, extension

    def write(self, iterator: Iterator[pa.RecordBatch]) -> WriterCommitMessage:
        """Stage one partition; Spark calls this in a task.

        Raises:
            TFRecordError: a value cannot be written.
            OSError: the disk is full; names the file.
        """
        context = TaskContext.get()
        if context is None:
            raise TFRecordError("expected to run in a Spark task: only Spark calls this method.")
        part = StagedPart(context.partitionId(), context.taskAttemptId(), self._extension)
        path = self._job.staged_path(part)
        records = (encode_records(piece, self._sidecar.record_type) for piece in _pieces(iterator))
        if write_records(path, records):
            return _Written(part)
        path.unlink()
        return _Written(None)

    def commit(self, messages: list[WriterCommitMessage | None]) -> None:
        """Make all partitions visible at once."""
        written = [message.part for message in messages if isinstance(message, _Written)]
        parts = [part for part in written if part is not None]
        self._job.commit(parts, self._sidecar.text())

    def abort(self, messages: list[WriterCommitMessage | None]) -> None:
        """Remove what the job has staged."""
        self._job.abort()


def _pieces(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Cut batches into row ranges of about ``_ENCODE_BYTES``."""
    for batch in batches:
        rows = max(1, batch.num_rows * _ENCODE_BYTES // max(1, batch.nbytes))
        for first in range(0, batch.num_rows, rows):
            yield batch.slice(first, rows)
