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

from recsys.artifacts import ArtifactError, PreparedData
from recsys.dataset import Corpus, named_corruption, raw_batches
from recsys.ranks import DotProduct

_BATCH = 4096
_SIGNATURES = ("embed_query", "embed_candidate")


def two_tower_scorer(savedmodel: Path, data: PreparedData, corpus: Corpus) -> DotProduct:
    """Embed the test queries and the corpus, to be compared by dot product.

    Args:
        savedmodel: folder of a SavedModel with `embed_query` and `embed_candidate`.
        data: prepared data whose test queries are scored.
        corpus: candidates of the data.

    Raises:
        ArtifactError: no such SavedModel, it reads features that the data lack, or it gives
            embeddings that are not finite.
    """
    towers = _load(savedmodel)
    query, candidate = (_signature(towers, savedmodel, name) for name in _SIGNATURES)
    queries = raw_batches(data, data.test, _BATCH)
    items = tf.data.Dataset.from_tensor_slices(dict(corpus.features)).batch(_BATCH)
    where = f"{savedmodel} on {data.directory}"
    _check_inputs(query, queries.element_spec, f"{where}: embed_query")
    _check_inputs(candidate, items.element_spec, f"{where}: embed_candidate")
    with named_corruption(data, data.test):
        embedded = _embed(query, queries, f"{where}: embed_query")
    return DotProduct(embedded, _embed(candidate, items, f"{where}: embed_candidate"))


def _load(savedmodel: Path) -> Any:
    try:
        return tf.saved_model.load(str(savedmodel))
    except (OSError, tf.errors.OpError) as error:
        raise ArtifactError(f"{savedmodel} cannot be loaded as a SavedModel: {error}") from error


def _signature(towers: Any, savedmodel: Path, name: str) -> Any:
    if name not in towers.signatures:
        raise ArtifactError(
            f"{savedmodel} has no signature {name!r}, only {sorted(towers.signatures)}: "
            "expected the towers that `recsys fit` writes"
        )
    return towers.signatures[name]


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


def _embed(signature: Any, batches: tf.data.Dataset, where: str) -> NDArray[np.float32]:
    names = list(signature.structured_input_signature[1])
    parts = [signature(**{n: batch[n] for n in names})["embedding"].numpy() for batch in batches]
    embeddings: NDArray[np.float32] = np.concatenate(parts)
    bad = np.count_nonzero(~np.isfinite(embeddings).all(axis=1))
    if bad:
        raise ArtifactError(
            f"{where} gives {bad} of {len(embeddings)} embeddings that are not finite: "
            "train again with a lower train.learning_rate"
        )
    return embeddings
