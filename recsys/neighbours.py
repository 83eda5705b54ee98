"""Which items are visited close to each other: a graph over all training sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from scipy import sparse

from recsys.artifacts import PreparedData, Sequences
from recsys.dataset import named_corruption, parsed_batches
from recsys.features import FeatureEncoder

#: Visits that lie further apart say little of each other.
_WINDOW = 6
#: Pairs that are held before they are added up.
_HELD = 4_000_000


def neighbours(
    data: PreparedData, splits: Sequence[Sequences], encoder: FeatureEncoder, number: int
) -> NDArray[np.int64]:
    """Find the items that are visited closest to each item, over these splits.

    A pair of visits counts one over the number of steps between them, as in the global graph of
    GCE-GNN (Wang et al., SIGIR 2020) every sequence adds its pairs, in both directions. Labels are
    visits too: no validation or test label may be among them.

    Args:
        data: what `prepare` made; the first item history is read.
        splits: training sequences.
        encoder: of raw features; its rows are what the graph is about.
        number: neighbours of an item.

    Returns:
        Rows of the item's vocabulary, `[vocabulary, number]`, the closest first; 0 where an item
        has fewer, and for missing and unknown ids.

    Raises:
        ArtifactError: a shard is corrupt.
    """
    item = data.features.item_histories[0].of or ""
    size = encoder.vocabulary_sizes()[item]
    total, held, waiting = sparse.csr_array((size, size), dtype=np.float64), [], 0
    with named_corruption(data, *splits):
        for visits, sequence in _visits(data, splits, encoder):
            pairs = _pairs(visits, sequence, encoder.reserved_rows(item))
            held.append(pairs)
            waiting += len(pairs[0])
            if waiting > _HELD:
                total, held, waiting = _added(total, held), [], 0
    return _closest(_added(total, held), number)


def _visits(
    data: PreparedData, splits: Sequence[Sequences], encoder: FeatureEncoder
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield rows of the visited items, and numbers of their sequences, both `[visits]`."""
    history = data.features.item_histories[0]
    spec = {name: tf.io.RaggedFeature(tf.string) for name in (history.name, "label")}
    files = [file for split in splits for file in data.files(split)]
    for batch in parsed_batches(files, spec):
        # The last label alone is no part of its sequence's history.
        ids = tf.concat([batch[history.name], batch["label"][:, -1:]], axis=1)
        encoded = encoder({history.name: ids.values})[history.name]
        yield encoded.numpy(), ids.value_rowids().numpy()


_Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]


def _pairs(visits: NDArray[np.int64], sequence: NDArray[np.int64], reserved: int) -> _Pairs:
    """Pair the visits of a sequence that lie close: both rows, and what the pair counts."""
    parts = []
    for steps in range(1, _WINDOW + 1):
        left, right = visits[:-steps], visits[steps:]
        counts = (sequence[:-steps] == sequence[steps:]) & (left != right)
        counts &= (left >= reserved) & (right >= reserved)
        parts.append((left[counts], right[counts], np.full(counts.sum(), 1 / steps)))
    left, right, weight = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return left, right, weight


def _added(total: sparse.csr_array, held: Sequence[_Pairs]) -> sparse.csr_array:
    if not held:
        return total
    left, right, weight = (np.concatenate(columns) for columns in zip(*held, strict=True))
    pairs = sparse.coo_array((weight, (left, right)), shape=total.shape).tocsr()
    return total + pairs + pairs.T


def _closest(total: sparse.csr_array, number: int) -> NDArray[np.int64]:
    """Keep the greatest of each row; of equals the more frequent, whose row is lower."""
    pairs = total.tocoo()
    order = np.lexsort((pairs.col, -pairs.data, pairs.row))
    row, column = pairs.row[order], pairs.col[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    found = np.zeros((total.shape[0], number), np.int64)
    kept = place < number
    found[row[kept], place[kept]] = column[kept]
    return found
