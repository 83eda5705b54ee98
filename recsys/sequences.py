"""Training sequences as a stream of batches: shuffled by epoch, shared by replicas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from recsys.artifacts import PreparedData, Sequences
from recsys.dataset import sequence_spec
from recsys.file_order import FileOrder
from recsys.judged import ITEM, PREFIX, flat_judged, judged_spec
from recsys.schema import Schema
from recsys.sequence_table import SequenceTable
from recsys.shards import WHOLE, Shards, Share

#: Batches that are sorted by length together, so that sequences of one batch are about equally
#: long and little of it is padding.
_SORTED_BATCHES = 16


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


def training_batches(
    data: PreparedData,
    splits: Sequence[Sequences],
    batch_size: int,
    order: Order,
    share: Share = WHOLE,
    cache_mib: int = 256,
) -> tf.data.Dataset:
    """Stream of shuffled raw batches, one pass over the sequences per epoch.

    All processes cut the same global batches, `batch_size` sequences each, out of a table in memory
    or out of files that are read anew each epoch (see `Shards.reading`). The stream has an element
    for each of its own replicas in turn: every so many-th sequence of the global batch, or of what
    the own files have of it, which may be none. So a model sees the same batches however many
    replicas there are.

    The order of an epoch depends on the seed and on the epoch's number alone, so that a training
    that resumes at epoch n sees what an undisturbed one would have seen. An epoch has as many
    batches as are needed; of a table only the last may be smaller, of files any may have a few
    sequences more or less. A replica's B sequences that hold M labels have

    - the histories by name, `[B, longest of the batch]`, oldest first, padded at the end;
    - `sequence` and `known`, int32 `[M]`: the label's row of the batch, and how many events of its
      history are before the label;
    - `label` (item id), `weight` and the other query features by name, `[M]`;
    - `judged`, where the data have judged events: what `flat_judged` gives of them, and `total`,
      how many the global batch has;
    - `pool`, the labels of the whole global batch, and `place`, int32 `[M]`: which are the own.
      Neither where processes read different files, as none knows the labels of the others; nor
      `total`.

    Args:
        data: what `prepare` made.
        splits: whose sequences to read.
        batch_size: sequences of a global batch.
        order: in which they come.
        share: of this process.
        cache_mib: of files in all that are read into a table.

    Raises:
        ArtifactError: see `Shards.reading`.
    """
    shards = Shards.of(data, splits)
    reading = shards.reading(share.processes, cache_mib)
    spec = sequence_spec(data) | judged_spec(data)
    lists = [f.name for f in data.features.histories()]
    by = lists[0] if lists else "label"
    source: SequenceTable | FileOrder
    if reading == "table":
        source = SequenceTable.read(shards.files, spec, batch_size, _SORTED_BATCHES, by)
    else:
        own = shards.own(share) if reading == "own files" else [*range(len(shards.files))]
        steps = math.ceil(sum(split.num_sequences for split in splits) / batch_size)
        source = FileOrder(
            shards.files, shards.num_sequences, own, spec, steps, _SORTED_BATCHES, by
        )
    if reading == "own files":
        share = share.within_process()

    def by_replica(batch: Any) -> tf.data.Dataset:
        numbers = tf.data.Dataset.range(share.replicas.start, share.replicas.stop)
        return numbers.map(lambda number: (number, batch))

    def own_labels(number: tf.Tensor, batch: Any) -> dict[str, Any]:
        labels = source.column("label", batch)
        # Every so many-th, so that replicas get sequences that are about equally long.
        places = tf.range(number, labels.nrows(), share.total)
        rows = source.rows(batch, places)
        judged = flat_judged(rows, data.features)
        flat = _flat_labels(rows, data.features) | ({"judged": judged} if judged else {})
        if reading == "own files":
            return flat
        if judged:
            judged["total"] = tf.size(source.column(ITEM, batch).values)
        place = labels.with_values(tf.range(tf.size(labels.values)))
        return flat | {"pool": labels.values, "place": tf.gather(place, places).values}

    return (
        tf.data.Dataset.range(order.epochs.start, order.epochs.stop)
        .flat_map(lambda epoch: source.batches(epoch, order.seed, order.buffer))
        .skip(order.skip)
        .flat_map(by_replica)
        .map(own_labels, num_parallel_calls=tf.data.AUTOTUNE)
    )


def _flat_labels(rows: dict[str, Any], schema: Schema) -> dict[str, tf.Tensor]:
    sequence = tf.cast(rows["label"].value_rowids(), tf.int32)
    others = [name for name in rows if name != "user" and not name.startswith(PREFIX)]
    flat = {name: rows[name].values for name in others}
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
