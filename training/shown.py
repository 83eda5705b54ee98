"""Shown lists as arrays: what each request was shown, in which order, and what was clicked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import Examples, PreparedData
from recsys.dataset import Corpus, named_corruption, parse_examples
from recsys.ranks import BLOCK_BYTES, Candidates, DotProduct
from recsys.schema import as_shown

_READ_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Shown:
    """The lists of a window, in file order, `[n, depth]` each.

    Attributes:
        items: corpus rows by position, -1 where there is none any more.
        positions: in the list that was shown, from 1; 0 for none.
        clicked: which items were.
        values: numbers of the items when they were shown, by field; NaN for none.
    """

    items: NDArray[np.int32]
    positions: NDArray[np.int32]
    clicked: NDArray[np.bool_]
    values: Mapping[str, NDArray[np.float32]]

    def scored(self, scorer: DotProduct) -> Iterator[Candidates]:
        """Yield the lists as candidates with their scores by retrieval, blocks in file order.

        Args:
            scorer: of these requests.
        """
        size = max(1, BLOCK_BYTES // (4 * len(scorer.candidates)))
        for first in range(0, len(self.items), size):
            queries = slice(first, min(first + size, len(self.items)))
            items = self.items[queries]
            own = np.take_along_axis(scorer.scores(queries), np.maximum(items, 0), axis=1)
            yield Candidates(queries, items, np.where(items < 0, -np.inf, own).astype(np.float32))


def read_shown(data: PreparedData, split: Examples, corpus: Corpus, depth: int) -> Shown:
    """Read the lists of a window, without items that are no candidates.

    Args:
        data: with impressions.
        split: which of their windows.
        corpus: of the data.
        depth: longer lists are cut.

    Raises:
        ArtifactError: a shard is corrupt.
    """
    assert data.impressions is not None, "asked where the data have shown lists"
    fields = [as_shown(name) for name in data.impressions.values]
    spec: dict[str, Any] = {
        "label": tf.io.RaggedFeature(tf.string),
        "shown_items": tf.io.RaggedFeature(tf.string),
        "shown_positions": tf.io.RaggedFeature(tf.int64),
    } | {field: tf.io.RaggedFeature(tf.float32) for field in fields}
    rows, parts, begin = corpus.rows(), [], 0
    with named_corruption(data, split):
        for records in tf.data.TFRecordDataset(data.files(split)).batch(_READ_BATCH):
            parsed = parse_examples(records, spec)
            shown, label = parsed["shown_items"], parsed["label"]
            item, taken = (rows.lookup(t.values).numpy() for t in (shown, label))
            query = shown.value_rowids().numpy()
            pairs = label.value_rowids().numpy() * len(corpus) + taken
            clicked = np.isin(query * len(corpus) + item, pairs[taken >= 0])
            told = [parsed[name].values.numpy() for name in ("shown_positions", *fields)]
            columns = [query + begin, item, clicked, *told]
            parts.append([column[item >= 0] for column in columns])
            begin += len(records)
    query, *own = (np.concatenate(column) for column in zip(*parts, strict=True))
    place = np.arange(len(query)) - np.searchsorted(query, query)
    kept = place < depth
    where = query[kept], place[kept]

    def lists(column: NDArray[Any], nothing: Any, kind: type) -> NDArray[Any]:
        filled: NDArray[Any] = np.full((begin, depth), nothing, kind)
        filled[where] = column[kept]
        return filled

    item, clicked, position, *values = own
    return Shown(
        items=lists(item, -1, np.int32),
        positions=lists(position, 0, np.int32),
        clicked=lists(clicked, False, np.bool_),
        values={f: lists(v, np.nan, np.float32) for f, v in zip(fields, values, strict=True)},
    )


def read_item_counts(
    data: PreparedData, corpus: Corpus
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How often each item was shown, and clicked: `[2, num_items]` each, training and validation.

    Raises:
        ArtifactError: a shard is corrupt.
    """
    assert data.impressions is not None, "asked where the data have shown lists"
    counts = data.corpus.model_copy(update={"path": data.impressions.counts})
    spec: dict[str, Any] = {
        "item": tf.io.FixedLenFeature([], tf.string),
        "shown": tf.io.FixedLenFeature([2], tf.int64),
        "clicked": tf.io.FixedLenFeature([2], tf.int64),
    }
    rows = corpus.rows()
    shown, clicked = np.zeros((2, len(corpus)), np.int64), np.zeros((2, len(corpus)), np.int64)
    with named_corruption(data, counts):
        for records in tf.data.TFRecordDataset(data.files(counts)).batch(_READ_BATCH):
            parsed = parse_examples(records, spec)
            item = rows.lookup(parsed["item"]).numpy()
            known = item >= 0
            shown[:, item[known]] = parsed["shown"].numpy()[known].T
            clicked[:, item[known]] = parsed["clicked"].numpy()[known].T
    return shown, clicked
