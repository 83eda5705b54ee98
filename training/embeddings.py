"""Embeddings of queries and corpus by the two signatures of a towers SavedModel.

The SavedModel may be of another run (a registered champion): its declared inputs are compared
with the prepared data before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import ArtifactError, Examples, PreparedData
from recsys.dataset import Corpus, named_corruption, raw_batches
from recsys.models.embed import BATCH, embed, in_batches, load_towers
from recsys.ranks import DotProduct


def two_tower_scorer(
    savedmodel: Path,
    data: PreparedData,
    corpus: Corpus,
    history: NDArray[np.int32],
    split: Examples | None = None,
) -> DotProduct:
    """Embed the queries of a split and the corpus, to be compared by dot product.

    Args:
        savedmodel: folder of a SavedModel with `embed_query` and `embed_candidate`.
        data: prepared data whose queries are scored.
        corpus: candidates of the data.
        history: `[queries, any]`, corpus rows of the items that the queries have seen.
        split: of the data; the test split if not given.

    Raises:
        ArtifactError: no such SavedModel, it reads features that the data lack, or it gives
            embeddings that are not finite.
    """
    towers = load_towers(savedmodel)
    split = data.test if split is None else split
    queries, items = raw_batches(data, split, BATCH), in_batches(corpus.features)
    for name, batches in (("embed_query", queries), ("embed_candidate", items)):
        where = f"{savedmodel} on {data.directory}: {name}"
        _check_inputs(towers.signatures[name], batches.element_spec, where)
    with named_corruption(data, split):
        embedded = embed(towers, "embed_query", queries)
    candidates = embed(towers, "embed_candidate", items)["embedding"]
    repeat = embedded.get("repeat")
    seen = None if repeat is None else _latest(history, repeat.shape[1])
    return DotProduct(embedded["embedding"], candidates, repeat, seen)


def _latest(history: NDArray[np.int32], length: int) -> NDArray[np.int32]:
    """The last `length` items of each history, `[n, length]`: another model may list fewer."""
    size = (history >= 0).sum(axis=1, keepdims=True)
    place = np.maximum(size - length, 0) + np.arange(length)
    padded = np.pad(history, ((0, 0), (0, 1)), constant_values=-1)
    inside = np.where(place < size, place, history.shape[1])
    latest: NDArray[np.int32] = np.take_along_axis(padded, inside, axis=1)
    return latest


def _check_inputs(signature: Any, available: Mapping[str, tf.TensorSpec], where: str) -> None:
    declared = signature.structured_input_signature[1]
    missing = sorted(set(declared) - set(available))
    if missing:
        raise ArtifactError(
            f"{where} reads features that the prepared data lack: {missing}; the data have "
            f"{sorted(available)}: SavedModel of another schema, add the features to the config"
        )
    for name, spec in declared.items():
        found = available[name]
        if spec.dtype != found.dtype or not spec.shape.is_compatible_with(found.shape):
            raise ArtifactError(
                f"{where} reads {name!r} as {spec.dtype.name} {spec.shape}, the prepared data have "
                f"{found.dtype.name} {found.shape}: SavedModel of another schema"
            )
