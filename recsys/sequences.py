"""Training sequences as a stream of batches: shuffled by epoch, shared by replicas.

Records are shuffled while they are still bytes, and parsed many at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from recsys.artifacts import PreparedData, Sequences
from recsys.dataset import parse_examples, sequence_spec
from recsys.schema import Schema

#: Batches that are sorted by length together, so that sequences of one batch are about equally
#: long and little of it is padding.
_SORTED_BATCHES = 16
#: No epoch has more parts of that many batches.
_MOST_PARTS = 2**32


class Order(NamedTuple):
    """In which order training sequences come, from which of them on.

    Attributes:
        epochs: numbers of the epochs.
        seed: of the shuffling, together with the number of the epoch.
        buffer: sequences that are shuffled together.
        skip: batches left out at the beginning.
    """

    epochs: range
    seed: int
    buffer: int
    skip: int = 0


class Share(NamedTuple):
    """Which part of each global batch a process feeds to its replicas.

    Attributes:
        replicas: numbers of its replicas among all.
        total: replicas of all processes.
    """

    replicas: range
    total: int


#: Of the only replica that there is.
WHOLE = Share(range(1), 1)


def training_batches(
    data: PreparedData,
    splits: Sequence[Sequences],
    batch_size: int,
    order: Order,
    share: Share = WHOLE,
) -> tf.data.Dataset:
    """Stream of shuffled raw batches, one pass over the sequences per epoch.

    Every process reads all sequences and cuts the same global batches, `batch_size` sequences each.
    The stream has an element for each of its own replicas in turn: every so many-th sequence of the
    global batch, which may be none of a small one. So a model sees the same batches however many
    replicas there are.

    The order of an epoch depends on the seed and on the epoch's number alone, so that a training
    that resumes at epoch n sees what an undisturbed one would have seen. The last batch of an
    epoch may be smaller. A replica's B sequences that hold M labels have

    - the histories by name, `[B, longest of the batch]`, oldest first, padded at the end;
    - `sequence` and `known`, int32 `[M]`: the label's row of the batch, and how many events of its
      history are before the label;
    - `label` (item id), `weight` and the other query features by name, `[M]`;
    - `pool`, the labels of the whole global batch, and `place`, int32 `[M]`: which are the own.
    """
    files = tf.constant([file for split in splits for file in data.files(split)])
    spec = sequence_spec(data)
    lists = [f.name for f in data.features.histories()]
    sized_by = lists[0] if lists else "label"

    def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        seed = [order.seed, epoch]
        shuffled = tf.random.experimental.stateless_shuffle(files, seed=seed)
        shuffle_seed = tf.random.stateless_uniform([], seed, maxval=tf.int64.max, dtype=tf.int64)
        records = tf.data.TFRecordDataset(shuffled).shuffle(order.buffer, seed=shuffle_seed)
        several = records.batch(batch_size * _SORTED_BATCHES)
        parsed = several.map(
            lambda bytes_: parse_examples(bytes_, spec), num_parallel_calls=tf.data.AUTOTUNE
        )
        # Without the number each part of an epoch would have its lengths in the same order.
        return parsed.enumerate(epoch * _MOST_PARTS).flat_map(
            lambda part, rows: _batches_by_length(rows, sized_by, batch_size, [order.seed, part])
        )

    def by_replica(rows: dict[str, Any]) -> tf.data.Dataset:
        numbers = tf.data.Dataset.range(share.replicas.start, share.replicas.stop)
        return numbers.map(lambda number: (number, rows))

    def own_labels(number: tf.Tensor, rows: dict[str, Any]) -> dict[str, tf.Tensor]:
        return _flat_labels(_own_rows(rows, number, share.total), data.features) | {
            "pool": rows["label"].values
        }

    return (
        tf.data.Dataset.range(order.epochs.start, order.epochs.stop)
        .flat_map(one_epoch)
        .skip(order.skip)
        .flat_map(by_replica)
        .map(own_labels, num_parallel_calls=tf.data.AUTOTUNE)
    )


def _batches_by_length(
    rows: dict[str, tf.RaggedTensor], sized_by: str, batch_size: int, seed: Sequence[Any]
) -> tf.data.Dataset:
    """Cut rows into batches of sequences that are about equally long, in random order."""
    order = tf.argsort(rows[sized_by].row_lengths(), stable=True)
    num_batches = (tf.size(order) + batch_size - 1) // batch_size
    numbers = tf.random.experimental.stateless_shuffle(tf.range(num_batches), seed=seed)

    def take(number: tf.Tensor) -> dict[str, tf.RaggedTensor]:
        chosen = order[number * batch_size : (number + 1) * batch_size]
        return {name: tf.gather(values, chosen) for name, values in rows.items()}

    return tf.data.Dataset.from_tensor_slices(numbers).map(take)


def _own_rows(rows: dict[str, Any], replica: tf.Tensor, total: int) -> dict[str, Any]:
    """Return every `total`-th row, so that replicas get sequences that are about equally long."""
    label = rows["label"]
    place = label.with_values(tf.range(tf.size(label.values)))
    own = tf.range(replica, label.nrows(), total)
    return {name: tf.gather(values, own) for name, values in (rows | {"place": place}).items()}


def _flat_labels(rows: dict[str, Any], schema: Schema) -> dict[str, tf.Tensor]:
    sequence = tf.cast(rows["label"].value_rowids(), tf.int32)
    flat = {name: values.values for name, values in rows.items() if name != "user"}
    for feature in schema.query:
        if feature.is_list:
            flat[feature.name] = _at_least_one_column(rows[feature.name].to_tensor(""))
        elif feature.vector_dim:
            flat[feature.name] = tf.reshape(flat[feature.name], [-1, feature.vector_dim])
    return flat | {"sequence": sequence, "known": tf.cast(flat["known"], tf.int32)}


def _at_least_one_column(history: tf.Tensor) -> tf.Tensor:
    """Pad histories that are all empty: encoders look at position 0, whatever they make of it."""
    missing = tf.maximum(1 - tf.shape(history)[1], 0)
    return tf.concat([history, tf.fill([tf.shape(history)[0], missing], "")], axis=1)
