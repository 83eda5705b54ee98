"""Training sequences that are read anew each epoch: each batch has its part of every file.

Which part depends on the file alone. So whoever reads only some of the files knows what of them is
in each batch without asking the others, all come to the end of their files in the same step, and
the batches are the same however many share the files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from recsys.dataset import parse_examples

#: Records that are handed on together.
_BLOCK = 256
#: No epoch has more parts of batches that are sorted together.
_MOST_PARTS = 2**32


@dataclass(frozen=True, slots=True)
class FileOrder:
    """Deals the sequences of files out to the steps of an epoch, as evenly as whole ones can be.

    Attributes:
        files: all of them.
        num_sequences: of each file.
        own: numbers of the files that are read.
        spec: how their records are parsed.
        steps: of an epoch.
        together: of so many steps the sequences of a file are sorted by length.
        by: the column whose length that is.
    """

    files: Sequence[str]
    num_sequences: Sequence[int]
    own: Sequence[int]
    spec: dict[str, Any]
    steps: int
    together: int
    by: str

    def batches(self, epoch: tf.Tensor, seed: int, buffer: int) -> tf.data.Dataset:
        """Cut what the own files hold into the batches of an epoch, parsed columns by name.

        Args:
            epoch: its number.
            seed: of the shuffling.
            buffer: sequences of all files that are shuffled together.
        """
        own = tf.data.Dataset.from_tensor_slices(tf.constant(self.own, tf.int64))
        lots = own.interleave(
            lambda number: self._lots(number, [seed, epoch], math.ceil(buffer / len(self.files))),
            cycle_length=len(self.own),
            block_length=1,
        )
        parts = lots.ragged_batch(len(self.own)).map(
            lambda lots: parse_examples(lots.values, self.spec), num_parallel_calls=tf.data.AUTOTUNE
        )
        return parts.enumerate().flat_map(
            lambda part, rows: self._cut(part, rows, [seed, epoch * _MOST_PARTS + part])
        )

    def column(self, name: str, batch: dict[str, tf.RaggedTensor]) -> tf.RaggedTensor:
        """A column of all sequences of a batch."""
        return batch[name]

    def rows(self, batch: dict[str, tf.RaggedTensor], places: tf.Tensor) -> dict[str, Any]:
        """Columns of the sequences at these places of a batch."""
        return {name: tf.gather(values, places) for name, values in batch.items()}

    def _lots(self, number: tf.Tensor, seed: Sequence[Any], buffer: int) -> tf.data.Dataset:
        """Serialised sequences of a file, `[any]` for each part of an epoch."""
        file = tf.gather(tf.constant(self.files), number)
        # Files that are alike must not be shuffled alike.
        seeds = tf.random.stateless_uniform(
            [len(self.files)], seed, maxval=tf.int64.max, dtype=tf.int64
        )
        records = tf.data.TFRecordDataset(file).shuffle(buffer, seed=seeds[number])
        starts = range(0, self.steps, self.together)
        sizes = self._sizes(number[tf.newaxis], tf.constant([*starts, self.steps], tf.int64))[0]
        nothing = tf.data.Dataset.from_tensors(tf.zeros([0], tf.string)).repeat()
        # A file that has come to its end still takes part, with nothing.
        lots = records.batch(_BLOCK).rebatch(sizes).concatenate(nothing)

        def checked(lot: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
            told = [
                file,
                "holds fewer sequences than its manifest says: run `recsys prepare` again",
            ]
            with tf.control_dependencies(
                [tf.debugging.Assert(tf.size(lot, size.dtype) == size, told)]
            ):
                return tf.identity(lot)

        return tf.data.Dataset.zip(lots, tf.data.Dataset.from_tensor_slices(sizes)).map(checked)

    def _cut(
        self, part: tf.Tensor, rows: dict[str, tf.RaggedTensor], seed: Sequence[Any]
    ) -> tf.data.Dataset:
        """Cut the rows of a part into those of its steps, each of about equal length."""
        first = part * self.together
        starts = tf.range(first, tf.minimum(first + self.together, self.steps) + 1)
        sizes = self._sizes(tf.constant(self.own, tf.int64), starts)
        file = tf.repeat(tf.range(len(self.own)), tf.reduce_sum(sizes, axis=1))
        by_length = tf.argsort(rows[self.by].row_lengths(), stable=True)
        order = tf.gather(by_length, tf.argsort(tf.gather(file, by_length), stable=True))
        num_steps = tf.size(starts) - 1
        step = tf.repeat(tf.tile(tf.range(num_steps), [len(self.own)]), tf.reshape(sizes, [-1]))

        def take(number: tf.Tensor) -> dict[str, tf.RaggedTensor]:
            chosen = tf.boolean_mask(order, step == number)
            return {name: tf.gather(values, chosen) for name, values in rows.items()}

        numbers = tf.random.experimental.stateless_shuffle(tf.range(num_steps), seed=seed)
        return tf.data.Dataset.from_tensor_slices(numbers).map(take)

    def _sizes(self, numbers: tf.Tensor, starts: tf.Tensor) -> tf.Tensor:
        """Sequences of files between one step and the next of `starts`, `[files, starts - 1]`."""
        number = numbers[:, tf.newaxis]
        count = tf.gather(tf.constant(self.num_sequences, tf.int64), number)
        # Otherwise all files of a size would have one more in the same steps.
        offset = number * self.steps // len(self.files)
        before = (count * starts + offset) // self.steps
        return before[:, 1:] - before[:, :-1]
