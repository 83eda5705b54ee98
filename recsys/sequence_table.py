"""Training sequences that are parsed once and held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from recsys.dataset import parsed_batches

#: No epoch has more parts of batches that are sorted together.
_MOST_PARTS = 2**32


@dataclass(frozen=True, slots=True)
class SequenceTable:
    """Parsed columns of all sequences, a row each, in the order of the files.

    Attributes:
        columns: ragged `[sequences, any]` by name.
        starts: int64 `[files + 1]`, rows where the sequences of each file begin, and the end.
        batch_size: rows of all batches of an epoch but the last.
        together: of so many batches the rows are sorted by length.
        by: the column whose length that is.
    """

    columns: dict[str, tf.RaggedTensor]
    starts: tf.Tensor
    batch_size: int
    together: int
    by: str

    @classmethod
    def read(
        cls, files: Sequence[str], spec: dict[str, Any], batch_size: int, together: int, by: str
    ) -> SequenceTable:
        """Read and parse all files; columns of other than ragged features are left out."""
        parts, starts = [], [0]
        for file in files:
            own = list(parsed_batches([file], spec))
            parts += own
            starts.append(starts[-1] + sum(int(part["label"].nrows()) for part in own))
        names = [name for name, rule in spec.items() if isinstance(rule, tf.io.RaggedFeature)]
        # Taken out of the parts, so that there are never two copies of more than a column.
        columns = {name: tf.concat([part.pop(name) for part in parts], axis=0) for name in names}
        return cls(columns, tf.constant(starts, tf.int64), batch_size, together, by)

    def batches(self, epoch: tf.Tensor, seed: int, buffer: int) -> tf.data.Dataset:
        """Cut the rows of an epoch into batches: their numbers, int64 `[at most batch_size]`.

        Args:
            epoch: its number.
            seed: of the shuffling.
            buffer: rows that are shuffled together.
        """
        files = tf.range(tf.size(self.starts) - 1)
        shuffled = tf.random.experimental.stateless_shuffle(files, seed=[seed, epoch])
        shuffle_seed = tf.random.stateless_uniform(
            [], [seed, epoch], maxval=tf.int64.max, dtype=tf.int64
        )
        rows = tf.data.Dataset.from_tensor_slices(shuffled).flat_map(
            lambda file: tf.data.Dataset.range(self.starts[file], self.starts[file + 1])
        )
        parts = rows.shuffle(buffer, seed=shuffle_seed).batch(self.batch_size * self.together)
        lengths = self.columns[self.by].row_lengths()
        # Without the number each part of an epoch would have its lengths in the same order.
        return parts.enumerate(epoch * _MOST_PARTS).flat_map(
            lambda number, part: _batches_by_length(
                part, tf.gather(lengths, part), self.batch_size, [seed, number]
            )
        )

    def column(self, name: str, batch: tf.Tensor) -> tf.RaggedTensor:
        """A column of all sequences of a batch."""
        return tf.gather(self.columns[name], batch)

    def rows(self, batch: tf.Tensor, places: tf.Tensor) -> dict[str, tf.RaggedTensor]:
        """Columns of the sequences at these places of a batch."""
        own = tf.gather(batch, places)
        return {name: tf.gather(values, own) for name, values in self.columns.items()}


def _batches_by_length(
    part: tf.Tensor, lengths: tf.Tensor, batch_size: int, seed: Sequence[Any]
) -> tf.data.Dataset:
    """Cut rows into batches of sequences that are about equally long, in random order."""
    by_length = tf.gather(part, tf.argsort(lengths, stable=True))
    num_batches = (tf.size(part) + batch_size - 1) // batch_size
    numbers = tf.random.experimental.stateless_shuffle(tf.range(num_batches), seed=seed)
    return tf.data.Dataset.from_tensor_slices(numbers).map(
        lambda number: by_length[number * batch_size : (number + 1) * batch_size]
    )
