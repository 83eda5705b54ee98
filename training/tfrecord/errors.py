"""Errors of the TFRecord codec: one family, so that a caller can catch them all."""

from __future__ import annotations


class TFRecordError(ValueError):
    """Data, a schema, a path or an option that cannot be written to or read from TFRecord."""


class RecordError(TFRecordError):
    """One record of a batch cannot be decoded.

    The codec knows records only by their index in a batch; whoever knows the file turns
    this into a ``TFRecordError`` that names the file and the byte offset.

    Attributes:
        row: index of the record in the batch that was being decoded, from 0.
        reason: what was expected, what was found and what to do.
    """

    def __init__(self, row: int, reason: str) -> None:
        """Remember where and why."""
        super().__init__(f"record {row} of the batch: {reason}")
        self.row = row
        self.reason = reason
