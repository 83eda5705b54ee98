"""TFRecord files for Spark, and for Python without Spark: a data source and its codec.

With Spark (4.0 or later; every node needs this package)::

    register(spark)
    df.write.format("tfrecord").option("recordType", "Example").mode("overwrite").save(path)
    spark.read.format("tfrecord").load(path)

``.mode("overwrite")`` or ``.mode("append")`` is required, Spark's default mode is an error for
Python data sources. ``source`` documents the options, ``features`` the types, ``infer`` the
schema of files that were written by others.

Without Spark: ``write_records(path, [encode_records(batch)])`` and ``decode_file(path, schema)``
on Arrow record batches. Spark is imported by ``register`` only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.tfrecord.decode import decode_file
from training.tfrecord.encode import encode_records
from training.tfrecord.errors import TFRecordError
from training.tfrecord.features import RecordType
from training.tfrecord.framing import write_records

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = [
    "RecordType",
    "TFRecordError",
    "decode_file",
    "encode_records",
    "register",
    "write_records",
]


def register(spark: SparkSession) -> None:
    """Make ``format("tfrecord")`` known to a Spark session."""
    from training.tfrecord.source import TFRecordDataSource

    spark.dataSource.register(TFRecordDataSource)
