"""Which items are visited close to each other: a graph over all training sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from scipy import sparse

from recsys.artifacts import PreparedData, Sequences
from recsys.dataset import named_corruption, parsed_batches
from recsys.features import FeatureEncoder
from recsys.session_knn import nth_of_row

#: Visits that lie further apart say little of each other.
_WINDOW = 6
#: What a pair of visits counts, divided by the steps between them: whole numbers, whose sums do not
#: depend on the order of the files.
_WHOLE = math.lcm(*range(1, _WINDOW + 1))
#: Pairs that are held before they are added up.
_HELD = 4_000_000
#: Rows whose neighbours are chosen together.
_BLOCK = 65_536


def neighbours(
    data: PreparedData,
    splits: Sequence[Sequences],
    encoder: FeatureEncoder,
    number: int,
    advance: Callable[[], None] = lambda: None,
) -> NDArray[np.int64]:
    """Find the items that are visited closest to each item, over these splits.

    As in the global graph of GCE-GNN (Wang et al., SIGIR 2020) all sequences add to one graph: a
    label is paired with each of the few events before it, in both directions. Unlike there a pair
    counts one divided by the number of steps between the two. Steps within events of the same
    moment mean nothing: they are in the order of their ids.

    Args:
        data: what `prepare` made; the first item history is read.
        splits: training sequences.
        encoder: of raw features; its rows are what the graph is about.
        number: neighbours of an item.
        advance: called now and then, as a sign of life.

    Returns:
        Rows of the item's vocabulary, `[vocabulary, number]`, the closest first, of equals the more
        frequent; 0 where an item has fewer, and for missing and unknown ids.

    Raises:
        ArtifactError: a shard is corrupt.
    """
    item = data.features.item_histories[0].of or ""
    size, reserved = encoder.vocabulary_sizes()[item], encoder.reserved_rows(item)
    total, held, waiting = sparse.csr_array((size, size), dtype=np.int64), [], 0
    with named_corruption(data, *splits):
        for left, right, count in _pairs(data, splits, encoder):
            counts = (left != right) & (left >= reserved) & (right >= reserved)
            ends = np.minimum(left, right), np.maximum(left, right)
            held.append(tuple(column[counts] for column in (count, *ends)))
            waiting += len(held[-1][0])
            # Adding copies the sum: done the more rarely, the larger it is.
            if waiting > max(_HELD, total.nnz):
                total, held, waiting = total + _added(held, size), [], 0
            advance()
    return _closest(total + _added(held, size), number)


def _pairs(
    data: PreparedData, splits: Sequence[Sequences], encoder: FeatureEncoder
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Yield rows of an earlier event's item and of a label's, and what the pair counts, `[pairs]`.

    Records repeat events of each other, but no labels, so that no pair is counted twice.
    """
    history = data.features.item_histories[0].name
    spec = {name: tf.io.RaggedFeature(tf.string) for name in (history, "label")}
    spec["known"] = tf.io.RaggedFeature(tf.int64)
    files = [file for split in splits for file in data.files(split)]
    for batch in parsed_batches(files, spec):
        events, labels = (
            encoder({history: batch[name].values})[history].numpy() for name in (history, "label")
        )
        known = batch["known"].values.numpy()
        first = batch[history].row_starts().numpy()[batch["known"].value_rowids().numpy()]
        for steps in range(1, _WINDOW + 1):
            label = np.flatnonzero(known >= steps)
            earlier = events[first[label] + known[label] - steps]
            yield earlier, labels[label], np.full(len(label), _WHOLE // steps)


def _added(held: Sequence[tuple[NDArray[np.int64], ...]], size: int) -> sparse.csr_array:
    """Add up what equal pairs count, `[size, size]`, above the diagonal."""
    none = (np.zeros(0, np.int64),) * 3
    count, low, high = (np.concatenate(columns) for columns in zip(none, *held, strict=True))
    ends = low.astype(np.int32), high.astype(np.int32)
    return sparse.coo_array((count, ends), shape=(size, size)).tocsr()


def _closest(total: sparse.csr_array, number: int) -> NDArray[np.int64]:
    """Keep the greatest of each row and column of a matrix above the diagonal."""
    both = (total + total.T).tocsr()
    found = np.zeros((total.shape[0], number), np.int64)
    for start in range(0, total.shape[0], _BLOCK):
        pairs = both[start : start + _BLOCK].tocoo()
        # Frequent items have low rows.
        order = np.lexsort((pairs.col, -pairs.data, pairs.row))
        row, column = pairs.row[order], pairs.col[order]
        place = nth_of_row(row)
        kept = place < number
        found[start + row[kept], place[kept]] = column[kept]
    return found
