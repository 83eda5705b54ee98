"""Filters by item attribute inside the served graph: which corpus rows a request lets back.

A request gives `filter_NAME` for each filter, always, as servers know no default values:

- category or id: string `[batch, any]`, padded with "". An item passes whose value is one of them;
  without any value all items pass.
- number: float32 `[batch, 2]`, least and most, both included; NaN or infinity leaves an end open.

An item without a value passes only where its filter is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import ArtifactError
from recsys.dataset import Corpus
from recsys.schema import Feature

_SHOWN_VALUES = 3


class Filter(Protocol):
    """Passes some items of the corpus, by what a request asks for."""

    def spec(self, name: str) -> tf.TensorSpec:
        """Input of the signature."""
        ...

    def share(self, asked: tf.Tensor) -> tf.Tensor:
        """Share of the corpus that passes, float32 `[batch]`."""
        ...

    def passes(self, asked: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Which corpus rows pass, bool `[batch, n]`; rows are `[batch, n]`, or `[1, n]` for all."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the contract says of the values."""
        ...


class OneOf(tf.Module):
    """Passes items whose value is among those that are asked for.

    Args:
        values: of the items, bytes `[N]`, b"" where missing; not all are.
    """

    def __init__(self, values: NDArray[np.object_]) -> None:
        super().__init__()
        found, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
        self._size = len(found)
        self._codes = tf.Variable(codes.astype(np.int32), trainable=False, name="codes")
        shares = (counts / len(values)).astype(np.float32)
        self._shares = tf.Variable(shares, trainable=False, name="shares")
        present = np.flatnonzero(found != b"")
        initializer = tf.lookup.KeyValueTensorInitializer(
            tf.constant(found[present], tf.string), tf.constant(present, tf.int32)
        )
        self._table = tf.lookup.StaticHashTable(initializer, default_value=-1)
        most = present[np.argsort(-counts[present], kind="stable")][:_SHOWN_VALUES]
        self._frequent = [value.decode() for value in found[most]]
        self._num_values = len(present)

    def spec(self, name: str) -> tf.TensorSpec:
        """Input of the signature."""
        return tf.TensorSpec([None, None], tf.string, name)

    def share(self, asked: tf.Tensor) -> tf.Tensor:
        """Share of the corpus that passes, `[batch]`; above it where a value is given twice."""
        codes = self._table.lookup(asked)
        shares = tf.where(codes < 0, 0.0, tf.gather(self._shares, tf.maximum(codes, 0)))
        return tf.where(_is_open(asked), 1.0, tf.minimum(tf.reduce_sum(shares, axis=1), 1.0))

    def passes(self, asked: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Which corpus rows pass, `[batch, n]`."""
        codes = tf.gather(self._codes, rows)
        codes = tf.broadcast_to(codes, [tf.shape(asked)[0], tf.shape(codes)[1]])
        wanted = contains(self._table.lookup(asked), codes, self._size)
        return wanted | _is_open(asked)[:, tf.newaxis]

    def describe(self) -> dict[str, Any]:
        """How many values there are, and the most frequent."""
        return {"kind": "one_of", "num_values": self._num_values, "frequent": self._frequent}


class Between(tf.Module):
    """Passes items whose number lies between two ends, both included.

    Args:
        values: of the items, float32 `[N]`, NaN where missing; not all are.
    """

    def __init__(self, values: NDArray[np.float32]) -> None:
        super().__init__()
        self._values = tf.Variable(values, trainable=False, name="values")
        present = np.sort(values[~np.isnan(values)])
        self._sorted = tf.Variable(present, trainable=False, name="sorted")
        self._ends = [float(value) for value in present[[0, -1]]]

    def spec(self, name: str) -> tf.TensorSpec:
        """Input of the signature."""
        return tf.TensorSpec([None, 2], tf.float32, name)

    def share(self, asked: tf.Tensor) -> tf.Tensor:
        """Share of the corpus that passes, `[batch]`."""
        least, most, is_open = _ends(asked)
        end = tf.searchsorted(self._sorted, most, side="right")
        passing = tf.maximum(end - tf.searchsorted(self._sorted, least, side="left"), 0)
        share = tf.cast(passing, tf.float32) / tf.cast(tf.size(self._values), tf.float32)
        return tf.where(is_open, 1.0, share)

    def passes(self, asked: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Which corpus rows pass, `[batch, n]`."""
        least, most, is_open = (part[:, tf.newaxis] for part in _ends(asked))
        values = tf.gather(self._values, rows)
        return is_open | ((values >= least) & (values <= most))

    def describe(self) -> dict[str, Any]:
        """Least and greatest number of the corpus."""
        return {"kind": "between", "ends": self._ends}


def item_filters(corpus: Corpus, features: Sequence[Feature]) -> dict[str, OneOf | Between]:
    """Make the filters by candidate features, by their names.

    Raises:
        ArtifactError: no item has a value of one of them.
    """
    filters: dict[str, OneOf | Between] = {}
    for feature in features:
        values = corpus.features[feature.name]
        number = feature.kind == "number"
        if not (~np.isnan(values) if number else values != b"").any():
            raise ArtifactError(
                f"export.filters: none of {len(corpus)} items has a value of {feature.name!r} "
                f"(column {feature.source_column!r}); remove it, or mend the table of items"
            )
        filters[feature.name] = Between(values) if number else OneOf(values)
    return filters


def contains(listed: tf.Tensor, wanted: tf.Tensor, size: int) -> tf.Tensor:
    """Which of `wanted` `[batch, n]` the same row of `listed` `[batch, m]` holds, `[batch, n]`.

    Both hold numbers below `size`; negative ones are held by nothing. Memory does not grow with
    `n * m`.
    """
    keys = tf.sort(tf.reshape(_keys(listed, size), [-1]))
    # One key that matches nothing lets an empty list be looked into.
    keys = tf.concat([[tf.constant(-1, tf.int64)], keys], axis=0)
    sought = tf.reshape(_keys(wanted, size), [-1])
    position = tf.searchsorted(keys, sought, side="right") - 1
    found = (tf.gather(keys, position) == sought) & (sought >= 0)
    return tf.reshape(found, tf.shape(wanted))


def _keys(numbers: tf.Tensor, size: int) -> tf.Tensor:
    """A number for each pair of row and number; -1 for a negative one."""
    row = tf.range(tf.shape(numbers, tf.int64)[0])[:, tf.newaxis]
    keys = row * size + tf.cast(numbers, tf.int64)
    return tf.where(numbers < 0, tf.constant(-1, tf.int64), keys)


def _is_open(asked: tf.Tensor) -> tf.Tensor:
    return tf.reduce_all(asked == "", axis=1)


def _ends(asked: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Least and most, infinite where open, and whether both are, `[batch]` each."""
    given = tf.math.is_finite(asked)
    least = tf.where(given[:, 0], asked[:, 0], -np.inf)
    most = tf.where(given[:, 1], asked[:, 1], np.inf)
    return least, most, tf.logical_not(tf.reduce_any(given, axis=1))
