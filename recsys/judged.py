"""Judged events of training sequences, from records to what a ranking head learns from.

A record lists them as `judged.item`, `judged.known`, `judged.event` and `judged.weight`, with
`judged.` and its name for each query feature that is no history; no feature has a dot in its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from recsys.artifacts import PreparedData
from recsys.schema import Schema

PREFIX = "judged."
ITEM = f"{PREFIX}item"


def judged_spec(data: PreparedData) -> dict[str, Any]:
    """How `parse_examples` reads the judged events; empty where the data have none."""
    if not data.judged:
        return {}
    dtypes = {"item": tf.string, "known": tf.int64, "event": tf.string, "weight": tf.float32}
    for feature in data.features.query:
        if feature.kind != "history":
            dtype = feature.dtype if feature.dtype != "float" else "float32"
            dtypes[feature.name] = tf.dtypes.as_dtype(dtype)
    return {f"{PREFIX}{name}": tf.io.RaggedFeature(dtype) for name, dtype in dtypes.items()}


def flat_judged(rows: Mapping[str, tf.RaggedTensor], schema: Schema) -> dict[str, tf.Tensor]:
    """Judged events of the sequences of a batch, one row each, as `training_batches` has labels.

    Returns:
        `sequence` and `known`, int32 `[M]`, `item`, `event`, `weight` and the query features that
        are no histories; nothing where the sequences have none.
    """
    own = {name.removeprefix(PREFIX): v for name, v in rows.items() if name.startswith(PREFIX)}
    if not own:
        return {}
    sequence = tf.cast(own["item"].value_rowids(), tf.int32)
    flat = {name: values.values for name, values in own.items()}
    for feature in schema.query:
        if feature.vector_dim:
            flat[feature.name] = tf.reshape(flat[feature.name], [-1, feature.vector_dim])
    return flat | {"sequence": sequence, "known": tf.cast(flat["known"], tf.int32)}


def judgements(
    judged: Mapping[str, tf.Tensor],
    rows: tf.lookup.StaticHashTable,
    num_warm: int,
    positive: Sequence[str],
) -> dict[str, tf.Tensor]:
    """What the model reads of raw judged events: rows of their items, and what is to be learned.

    Args:
        judged: see `flat_judged`.
        rows: corpus row by item.
        num_warm: an item from this row on has no vector of its own to learn, and does not count.
        positive: event types that are 1.

    Returns:
        The other values as they are, with `row` int32, `outcome` and `weight` float32, `[M]`.
    """
    row = rows.lookup(judged["item"])
    counts = (row >= 0) & (row < num_warm)
    outcome = tf.reduce_any(judged["event"][:, tf.newaxis] == tf.constant(list(positive)), axis=1)
    own = {name: values for name, values in judged.items() if name not in ("item", "event")}
    return own | {
        "row": tf.where(counts, row, 0),
        "outcome": tf.cast(outcome, tf.float32),
        "weight": tf.where(counts, judged["weight"], 0.0),
    }


def missing_judgements(
    counts: Mapping[str, Mapping[str, int]], positive: Sequence[str]
) -> str | None:
    """Say which split lacks which events to learn or measure a ranking head by; None if none does.

    Args:
        counts: judged events by split and type.
        positive: event types that are 1.

    >>> missing_judgements({"train": {"like": 3}}, ["like"])
    "train has no judged event that is not of model.joint.positive=['like'], only {'like': 3}"
    """
    for split, by_type in counts.items():
        liked = sum(count for name, count in by_type.items() if name in positive)
        of = "" if not liked else "not " if liked == sum(by_type.values()) else None
        if of is not None:
            told = f"model.joint.positive={list(positive)}, only {dict(by_type)}"
            return f"{split} has no judged event that is {of}of {told}"
    return None
