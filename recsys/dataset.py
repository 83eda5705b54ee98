"""TFRecords to tensors: batched parsing, the corpus, whole splits.

Parsing a batch at once is some thirty times faster than parsing record by record, so records are
batched while they are still bytes (tensorflow.org/guide/data_performance).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import ArtifactError, Examples, PreparedData, Queries, Sequences
from recsys.artifacts import Corpus as CorpusFiles
from recsys.schema import Feature, missing_value

_READ_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Corpus:
    """All candidates, one row each, most frequent first.

    Attributes:
        item: ids, `[num_items]` bytes.
        name: readable names, `[num_items]` bytes.
        count: training events, `[num_items]`.
        labels: training examples with this label, `[num_items]`.
        features: raw candidate features by name, `[num_items]` each, vectors `[num_items, dim]`.
    """

    item: NDArray[np.object_]
    name: NDArray[np.object_]
    count: NDArray[np.int64]
    labels: NDArray[np.int64]
    features: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.item)

    def rows(self) -> tf.lookup.StaticHashTable:
        """Table from item id to corpus row (int32), -1 for an id that is not in the corpus."""
        rows = tf.range(len(self), dtype=tf.int32)
        initializer = tf.lookup.KeyValueTensorInitializer(tf.constant(self.item, tf.string), rows)
        return tf.lookup.StaticHashTable(initializer, default_value=-1)


@dataclass(frozen=True, slots=True)
class Interactions:
    """One split as arrays, in file order.

    Attributes:
        user: `[n]` codes, equal for equal users within this split.
        user_id: `[n]` bytes.
        label: corpus rows, -1 when the item is not in the corpus: `[n]`, or `[num_labels]` where
            `splits` says which are whose.
        history: `[n, length]` corpus rows of the first item history, oldest first, -1 at the end.
        weight: `[n]`.
        exclusions: flat corpus rows and row splits `[n + 1]`, or None when nothing is excluded.
        at: `[n]` when the label was taken, in microseconds or, without time, by the first order
            column, 0 without either; None when it was not read.
        splits: `[n + 1]` where the labels of each query begin and end; None where it has one.
    """

    user: NDArray[np.int64]
    user_id: NDArray[np.object_]
    label: NDArray[np.int32]
    history: NDArray[np.int32]
    weight: NDArray[np.float32]
    exclusions: tuple[NDArray[np.int32], NDArray[np.int64]] | None
    at: NDArray[np.int64] | None = None
    splits: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.user)


def read_corpus(data: PreparedData) -> Corpus:
    """Read all candidates into memory.

    Raises:
        ArtifactError: a shard is missing or corrupt, or the corpus differs from the manifest.
    """
    spec = {
        "item": tf.io.FixedLenFeature([], tf.string),
        "name": tf.io.FixedLenFeature([], tf.string, ""),
        "count": tf.io.FixedLenFeature([], tf.int64),
        "labels": tf.io.FixedLenFeature([], tf.int64),
    } | feature_spec(data.features.candidate)
    columns = _read(data.files(data.corpus), spec)
    if len(columns["item"]) != data.corpus.num_items:
        raise ArtifactError(
            f"{data.directory / data.corpus.path} holds {len(columns['item'])} items, its manifest "
            f"says {data.corpus.num_items}: run `recsys prepare` again"
        )
    return Corpus(
        item=columns.pop("item"),
        name=columns.pop("name"),
        count=columns.pop("count"),
        labels=columns.pop("labels"),
        features=columns,
    )


def read_interactions(data: PreparedData, examples: Examples, corpus: Corpus) -> Interactions:
    """Read who took what after which history, without the other features."""
    histories = data.features.item_histories[:1]
    spec: dict[str, Any] = {
        "user": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.RaggedFeature(tf.string),
        "weight": tf.io.FixedLenFeature([], tf.float32, 1.0),
        "time": tf.io.FixedLenFeature([], tf.int64, 0),
        "exclusions": tf.io.RaggedFeature(tf.string),
    } | feature_spec(histories)
    rows = corpus.rows()
    parts: list[dict[str, NDArray[Any]]] = []
    with _named_corruption(data.files(examples)):
        for batch in parsed_batches(data.files(examples), spec):
            history = batch[histories[0].name] if histories else tf.zeros([len(batch["user"]), 0])
            parts.append(
                {
                    "user": batch["user"].numpy(),
                    "label": rows.lookup(batch["label"].values).numpy(),
                    "labels": batch["label"].row_lengths().numpy(),
                    "weight": batch["weight"].numpy(),
                    "at": batch["time"].numpy(),
                    "history": _history_rows(history, rows),
                    "exclusions": rows.lookup(batch["exclusions"].values).numpy(),
                    "excluded": batch["exclusions"].row_lengths().numpy(),
                }
            )
    whole = _concatenated(parts)
    exclusions = whole.pop("exclusions"), _row_splits(whole.pop("excluded"))
    splits = _row_splits(whole.pop("labels"))
    return _interactions(
        whole,
        exclusions if data.exclude_seen else None,
        splits if isinstance(examples, Queries) else None,
    )


def _row_splits(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)])


def read_sequences(data: PreparedData, sequences: Sequences, corpus: Corpus) -> Interactions:
    """Read training sequences as if each label were an example of its own."""
    histories = data.features.item_histories[:1]
    length = histories[0].length if histories else 0
    rows = corpus.rows()
    parts = []
    with _named_corruption(data.files(sequences)):
        for batch in parsed_batches(data.files(sequences), sequence_spec(data)):
            label = batch["label"]
            history = rows.lookup(batch[histories[0].name].to_tensor("")) if histories else None
            parts.append(
                {
                    "user": np.repeat(batch["user"].numpy(), label.row_lengths().numpy()),
                    "label": rows.lookup(label.values).numpy(),
                    "weight": batch["weight"].values.numpy(),
                    "at": batch["time"].values.numpy(),
                    "history": _known_rows(history, batch["known"], length),
                }
            )
    return _interactions(_concatenated(parts), None)


def _concatenated(parts: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _interactions(
    columns: dict[str, NDArray[Any]],
    exclusions: tuple[NDArray[np.int32], NDArray[np.int64]] | None,
    splits: NDArray[np.int64] | None = None,
) -> Interactions:
    user_id = columns.pop("user")
    user = np.unique(user_id.astype(bytes), return_inverse=True)[1].astype(np.int64)
    return Interactions(user, user_id, exclusions=exclusions, splits=splits, **columns)


def raw_batches(data: PreparedData, examples: Examples, batch_size: int) -> tf.data.Dataset:
    """Batches of raw query features in file order: `{name: [batch, *shape]}`."""
    spec = feature_spec(data.features.query)
    return (
        tf.data.TFRecordDataset(data.files(examples))
        .batch(batch_size)
        .map(lambda records: parse_examples(records, spec), num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )


@contextmanager
def named_corruption(data: PreparedData, *splits: Examples | CorpusFiles) -> Iterator[None]:
    """Turn TensorFlow's "corrupted record" into an error that names the file.

    Raises:
        ArtifactError: a shard of these splits is corrupt or truncated.
    """
    with _named_corruption([file for split in splits for file in data.files(split)]):
        yield


@contextmanager
def _named_corruption(files: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except tf.errors.DataLossError as error:
        raise _corrupt(files, error) from error


def _corrupt(files: Sequence[str], error: tf.errors.DataLossError) -> ArtifactError:
    # TensorFlow gives the offset but not the file: read them one by one until one fails alike.
    for file in files:
        try:
            for _ in tf.data.TFRecordDataset(file):
                pass
        except tf.errors.DataLossError as again:
            return ArtifactError(
                f"{file} is corrupt: {again.message}; run `recsys prepare` again to rewrite it"
            )
    return ArtifactError(f"a shard was corrupt when read: {error.message}")


def feature_spec(features: Sequence[Feature]) -> dict[str, Any]:
    """How `parse_examples` reads these features, one value each."""
    spec: dict[str, Any] = {}
    for feature in features:
        dtype = tf.dtypes.as_dtype(feature.dtype if feature.dtype != "float" else "float32")
        spec[feature.name] = (
            _History(feature.length)
            if feature.is_list
            else tf.io.FixedLenFeature(feature.shape, dtype, missing_value(feature))
        )
    return spec


def sequence_spec(data: PreparedData) -> dict[str, Any]:
    """How `parse_examples` reads training sequences: every column is a list."""
    spec: dict[str, Any] = {
        "user": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.RaggedFeature(tf.string),
        "known": tf.io.RaggedFeature(tf.int64),
        "weight": tf.io.RaggedFeature(tf.float32),
        "time": tf.io.RaggedFeature(tf.int64),
    }
    for feature in data.features.query:
        dtype = tf.dtypes.as_dtype(feature.dtype if feature.dtype != "float" else "float32")
        spec[feature.name] = tf.io.RaggedFeature(dtype)
    return spec


@dataclass(frozen=True)
class _History:
    length: int


def parse_examples(records: tf.Tensor, spec: dict[str, Any]) -> dict[str, tf.Tensor]:
    """Parse serialised examples, `[batch]`, at once."""
    lists = {name: rule for name, rule in spec.items() if isinstance(rule, _History)}
    parsed = tf.io.parse_example(
        records, spec | {name: tf.io.RaggedFeature(tf.string) for name in lists}
    )
    for name, rule in lists.items():
        recent = parsed[name][:, -rule.length :]
        parsed[name] = recent.to_tensor("", shape=[None, rule.length])
    return parsed


def parsed_batches(files: Sequence[str], spec: dict[str, Any]) -> tf.data.Dataset:
    """Batches of all records of these files, in order, parsed by `parse_examples`."""
    return (
        tf.data.TFRecordDataset(list(files))
        .batch(_READ_BATCH)
        .map(lambda records: parse_examples(records, spec), num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )


def _read(files: Sequence[str], spec: dict[str, Any]) -> dict[str, NDArray[Any]]:
    with _named_corruption(files):
        batches = list(parsed_batches(files, spec).as_numpy_iterator())
    if not batches:
        raise ArtifactError(f"{files[0]} holds no records: run `recsys prepare` again")
    return {name: np.concatenate([batch[name] for batch in batches]) for name in spec}


def _known_rows(
    history: tf.Tensor | None, known: tf.RaggedTensor, length: int
) -> NDArray[np.int32]:
    """Corpus rows of what each label knows, `[labels, length]`, padded with -1 at the end."""
    known_flat = known.values.numpy()
    window = np.full((len(known_flat), length), -1, np.int32)
    if history is None or history.shape[1] == 0:
        return window
    sequence = known.value_rowids().numpy()[:, None]
    place = np.maximum(known_flat - length, 0)[:, None] + np.arange(length)
    valid = place < known_flat[:, None]
    rows = history.numpy()[sequence, np.minimum(place, history.shape[1] - 1)]
    return np.where(valid, rows, window)


def _history_rows(history: tf.Tensor, table: tf.lookup.StaticHashTable) -> NDArray[np.int32]:
    """Corpus rows of a padded history; ids outside the corpus give their place to later ones."""
    if history.dtype != tf.string:
        return np.zeros(history.shape, np.int32)
    rows = table.lookup(history).numpy()
    order = np.argsort(rows < 0, axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1)
