"""A registered model over Arrow batches: columns in, lists of items and scores out, no pandas.

Inputs, their types and shapes are read from the contract inside the SavedModel, so a model that
another version of this package exported answers as well.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import ArtifactError
from recsys.list_config import PROPENSITIES
from serving_export.query_columns import QueryColumns, read_contract

logger = logging.getLogger(__name__)

#: Rows that are asked for at once, and rows times the longest lists among them: what bounds the
#: memory of a worker. Each value of the longest list is a candidate more that is fetched for all.
BATCH = 1024
CELLS = 1 << 20


class ArrowScorer:
    """The `recommend` signature of a registered model.

    Args:
        folder: a downloaded version; its `scann` variant answers, or `exact` where ScaNN's ops
            cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        variant = folder / "artifacts" / "scann"
        try:
            # Importing registers the ops; without them the SavedModel does not load.
            from scann.scann_ops.py import scann_ops  # noqa: F401
        except (ImportError, tf.errors.NotFoundError) as error:
            logger.warning("ScaNN is not available (%s): searching exactly, which is slower", error)
            variant = folder / "artifacts" / "exact"
        contract = read_contract(variant)
        self._inputs: dict[str, Any] = contract["signatures"]["recommend"]["inputs"]
        self._filters = {one["input"] for one in contract.get("filters", {}).values()}
        self._histories = QueryColumns.of(contract).histories
        self._numbers = number_lists(folder)
        self._model = tf.saved_model.load(str(variant))

    def answer(self, columns: Mapping[str, pa.Array], rows: int, k: int) -> pa.StructArray:
        """Recommend `k` items for each row.

        Args:
            columns: features by name, `exclusions` (lists of item ids) and `filter_NAME` (lists of
                values, or least and greatest number), each `rows` long. What is absent or null is
                unknown, and filters nothing.
            rows: number of rows.
            k: items wanted.

        Returns:
            `items` list<string> and `scores` list<float>, best first, and `propensities`
            list<float> where the model explores; shorter than k where fewer candidates are left.

        Raises:
            ArtifactError: a column does not fit the model.
        """
        asked = {name: columns[name] for name in self._inputs if name in columns}
        parts = cut(sum(map(_lengths, asked.values()), np.zeros(rows, np.int64)))
        answers = [
            self._part({name: column.take(part) for name, column in asked.items()}, len(part), k)
            for part in map(pa.array, parts)
        ]
        return pa.concat_arrays(answers).take(pa.array(np.argsort(np.concatenate(parts))))

    def _part(self, columns: Mapping[str, pa.Array], rows: int, k: int) -> pa.StructArray:
        """Answer rows that are asked for at once."""
        # Histories list the same events. An answer must not depend on who else is asked for.
        listed = [_lengths(columns[name]) for name in self._histories if name in columns]
        widths = dict.fromkeys(self._histories, int(np.max(listed, initial=0)))
        request = {
            name: tf.constant(
                _input(
                    name,
                    columns.get(name, pa.nulls(rows)),
                    spec,
                    widths.get(name, 0),
                    np.nan if name in self._filters else 0,
                )
            )
            for name, spec in self._inputs.items()
            if name != "k"
        }
        answer = self._model.signatures["recommend"](k=tf.constant(k, tf.int32), **request)
        filled = np.isfinite(answer["scores"].numpy())
        ends = np.concatenate([[0], np.cumsum(filled.sum(axis=1))]).astype(np.int32)
        items = pa.array(answer["ids"].numpy()[filled], pa.binary()).cast(pa.string())
        lists = [items]
        lists += [pa.array(answer[name].numpy()[filled], pa.float32()) for name in self._numbers]
        return pa.StructArray.from_arrays(
            [pa.ListArray.from_arrays(pa.array(ends), values) for values in lists],
            ["items", *self._numbers],
        )


def cut(widths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Part rows by width, so that one long list does not cost all others what it costs.

    Args:
        widths: values in the lists of each row, `[rows]`.

    Returns:
        Row numbers of each part, of at most `BATCH` rows and `CELLS` rows times width; a row that
        is wider stands alone. A single empty part where there are no rows.
    """
    order = np.argsort(widths, kind="stable")
    parts, start = [], 0
    while start < len(order):
        few = order[start : start + BATCH]
        # The last of a part is its widest.
        cells = widths[few] * np.arange(1, len(few) + 1)
        parts.append(few[: max(1, int(np.searchsorted(cells, CELLS, "right")))])
        start += len(parts[-1])
    return parts or [order]


def number_lists(folder: Path) -> tuple[str, ...]:
    """What a downloaded version answers beside `items`: `scores`, and `propensities` if any."""
    explores = "exploration" in read_contract(folder / "artifacts" / "exact")
    return ("scores", PROPENSITIES) if explores else ("scores",)


def _input(
    name: str, column: pa.Array, spec: Mapping[str, Any], width: int, empty: float
) -> NDArray[Any]:
    """One input as an array, `[rows]` or `[rows, length]`, missing values filled.

    Lists of texts are at least `width` long, numbers of a missing vector are `empty`.
    """
    try:
        if len(spec["shape"]) > 1 and spec["dtype"] == "float32":
            return _vectors(column, int(spec["shape"][1]), empty)
        if len(spec["shape"]) > 1:
            return _padded(column, width)
        if spec["dtype"] == "float32":
            floats: NDArray[Any] = column.cast(pa.float32()).to_numpy(zero_copy_only=False)
            return floats
        if spec["dtype"] == "int64":
            return np.asarray(column.cast(pa.int64()).fill_null(-1))
        return _texts(column)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise ArtifactError(
            f"column {name!r} of type {column.type} does not fit the model, which takes "
            f"{spec['dtype']} {['rows', *spec['shape'][1:]]}: {error}"
        ) from error


def _texts(column: pa.Array) -> NDArray[np.object_]:
    text = column if pa.types.is_binary(column.type) else column.cast(pa.string())
    values: NDArray[np.object_] = text.fill_null("").to_numpy(zero_copy_only=False)
    return values


def _lengths(column: pa.Array) -> NDArray[np.int64]:
    """Values in each list, `[rows]`; 0 where there are no lists of texts."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or pa.types.is_floating(kind.value_type):
        return np.zeros(len(column), np.int64)
    return np.asarray(pc.list_value_length(column).fill_null(0), np.int64)


def _padded(column: pa.Array, width: int) -> NDArray[np.object_]:
    """Lists of texts as `[rows, longest]` or wider; a missing value keeps its place."""
    if pa.types.is_null(column.type):
        return np.full([len(column), width], "", object)
    lengths = np.asarray(pc.list_value_length(column).fill_null(0))
    padded = np.full([len(column), max(width, int(lengths.max(initial=0)))], "", object)
    padded[np.arange(padded.shape[1]) < lengths[:, np.newaxis]] = _texts(column.flatten())
    return padded


def _vectors(column: pa.Array, dim: int, empty: float) -> NDArray[np.float32]:
    """Lists of `dim` numbers as `[rows, dim]`; a missing one is `empty` throughout."""
    vectors = np.full([len(column), dim], empty, np.float32)
    present = np.asarray(column.is_valid())
    if present.any():
        lengths = set(pc.list_value_length(column).drop_null().to_pylist())
        if lengths != {dim}:
            raise ValueError(f"found lists of {sorted(lengths - {dim})} numbers")
        flat = column.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False)
        vectors[present] = flat.reshape(-1, dim)
    return vectors
