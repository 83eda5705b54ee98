"""Embeddings by a saved pair of towers, of this run or of any other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import ArtifactError

BATCH = 4096


def load_towers(folder: Path) -> Any:
    """Load a SavedModel with the signatures `embed_query` and `embed_candidate`.

    Raises:
        ArtifactError: there is none, or it lacks a signature.
    """
    return load_savedmodel(folder, "embed_query", "embed_candidate")


def load_savedmodel(folder: Path, *signatures: str) -> Any:
    """Load a SavedModel with these signatures.

    Raises:
        ArtifactError: there is none, or it lacks a signature.
    """
    try:
        model = tf.saved_model.load(str(folder))
    except (OSError, tf.errors.OpError) as error:
        raise ArtifactError(f"{folder} cannot be loaded as a SavedModel: {error}") from error
    for name in signatures:
        if name not in model.signatures:
            step = "rank" if name.startswith("rank") else "fit"
            raise ArtifactError(
                f"{folder} has no signature {name!r}, only {sorted(model.signatures)}: "
                f"expected what `recsys {step}` writes"
            )
    return model


def in_batches(features: Mapping[str, NDArray[Any]]) -> tf.data.Dataset:
    """Raw features by name, `[rows]` or `[rows, length]`, as batches for `embed`."""
    return tf.data.Dataset.from_tensor_slices(dict(features)).batch(BATCH)


def embed(
    towers: Any, signature: str, batches: Iterable[Mapping[str, tf.Tensor]]
) -> dict[str, NDArray[np.float32]]:
    """Embed batches of raw features; features that the signature does not read are ignored.

    Returns:
        The outputs of the signature: `embedding` `[rows, embedding_dim]` and, of queries, what is
        added to the scores of the history's items, `repeat` `[rows, length]`, if there is such.

    Raises:
        ArtifactError: an output is not finite.
    """
    tower = towers.signatures[signature]
    names = list(tower.structured_input_signature[1])
    parts = [tower(**{n: batch[n] for n in names}) for batch in batches]
    outputs = {
        name: np.concatenate([part[name].numpy() for part in parts])
        for name in tower.structured_outputs
    }
    for values in outputs.values():
        bad = np.count_nonzero(~np.isfinite(values).all(axis=1))
        if bad:
            raise ArtifactError(
                f"{signature} gives {bad} of {len(values)} embeddings that are not finite: "
                "training diverged; run `recsys fit` with a lower train.learning_rate"
            )
    return outputs
