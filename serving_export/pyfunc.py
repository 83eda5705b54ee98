"""The file that MLflow logs with the model ("models from code"); it imports nothing of ours.

Inputs, their types and shapes are read from the contract inside the SavedModel.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import tensorflow as tf

logger = logging.getLogger(__name__)

_BATCH = 1024
_DEFAULT_K = 20


class Recommender(mlflow.pyfunc.PythonModel):
    """Recommendations for a table of queries, one row each."""

    def load_context(self, context: Any) -> None:
        """Load the `scann` variant, or `exact` where ScaNN's ops cannot be loaded."""
        folder = Path(context.artifacts["scann"])
        try:
            # Importing registers the ops; without them the SavedModel does not load.
            from scann.scann_ops.py import scann_ops  # noqa: F401
        except (ImportError, tf.errors.NotFoundError) as error:
            logger.warning("ScaNN is not available (%s): searching exactly, which is slower", error)
            folder = Path(context.artifacts["exact"])
        contract = json.loads((folder / "assets.extra" / "contract.json").read_text("utf-8"))
        self._inputs = contract["signatures"]["recommend"]["inputs"]
        self._filters = {one["input"] for one in contract.get("filters", {}).values()}
        self._histories = [f["name"] for f in contract["features"] if f["kind"] == "history"]
        self._model = tf.saved_model.load(str(folder))

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Recommend items for every row.

        Args:
            context: not used.
            model_input: columns by feature name, `exclusions` (lists of item ids), and
                `filter_NAME` (lists of values, or least and greatest number). Absent columns and
                missing values stand for "unknown" ("", NaN, -1, an empty list, a vector of
                zeros), in filters for "any".
            params: `k`, the number of items wanted.

        Returns:
            `ids` (lists of str) and `scores` (lists of float), best first; `propensities` (lists
            of float) where the model explores. A list is shorter than k where fewer candidates are
            left.
        """
        k = int((params or {}).get("k", _DEFAULT_K))
        parts = [
            self._answer(model_input.iloc[start : start + _BATCH], k)
            for start in range(0, max(len(model_input), 1), _BATCH)
        ]
        return pd.concat(parts)

    def _answer(self, frame: pd.DataFrame, k: int) -> pd.DataFrame:
        request = {
            name: tf.constant(_column(frame, name, spec, np.nan if name in self._filters else 0))
            for name, spec in self._inputs.items()
            if name not in {"k", *self._histories}
        }
        # Histories list the same events. An answer must not depend on who else is asked for.
        lists = {name: [_items(cell) for cell in _cells(frame, name)] for name in self._histories}
        width = max((len(events) for rows in lists.values() for events in rows), default=0)
        request |= {name: tf.constant(_padded(rows, width)) for name, rows in lists.items()}
        answer = self._model.signatures["recommend"](k=tf.constant(k, tf.int32), **request)
        filled = np.isfinite(answer["scores"].numpy()).sum(axis=1)
        columns = {
            name: [row[:n].tolist() for row, n in zip(answer[name].numpy(), filled, strict=True)]
            for name in ("ids", "scores", "propensities")
            if name in answer
        }
        columns["ids"] = [[item.decode() for item in row] for row in columns["ids"]]
        return pd.DataFrame(columns, index=frame.index)


def _column(
    frame: pd.DataFrame, name: str, spec: Mapping[str, Any], empty: float
) -> np.ndarray[Any, Any]:
    """One input as an array, `[rows]` or `[rows, length]`, missing values filled.

    Numbers of a missing vector are `empty`.
    """
    cells = _cells(frame, name)
    if len(spec["shape"]) > 1 and spec["dtype"] == "float32":
        return _vectors(cells, name, int(spec["shape"][1]), empty)
    if len(spec["shape"]) > 1:
        lists = [_items(cell) for cell in cells]
        return _padded(lists, max(map(len, lists), default=0))
    if spec["dtype"] == "float32":
        return pd.to_numeric(cells).to_numpy(np.float32, na_value=np.nan)
    if spec["dtype"] == "int64":
        return pd.to_numeric(cells).fillna(-1).to_numpy(np.int64)
    return np.array(["" if pd.isna(cell) else _text(cell) for cell in cells], object)


def _cells(frame: pd.DataFrame, name: str) -> Any:
    return frame[name] if name in frame else pd.Series([None] * len(frame))


def _vectors(cells: Any, name: str, dim: int, empty: float) -> np.ndarray[Any, Any]:
    """Lists of `dim` numbers as `[rows, dim]`; a missing one is `empty` throughout."""
    vectors = np.full([len(cells), dim], empty, np.float32)
    for row, (index, cell) in enumerate(cells.items()):
        if cell is None or isinstance(cell, float):
            continue
        if len(cell) != dim:
            raise ValueError(
                f"column {name!r}, row {index!r}: expected {dim} numbers, found {len(cell)}"
            )
        vectors[row] = np.array(cell, np.float32)  # None is NaN
    return vectors


def _items(cell: Any) -> list[str | bytes]:
    if cell is None or isinstance(cell, float):
        return []
    # A missing value keeps its place: the histories of a query list the same events.
    return ["" if value is None else _text(value) for value in cell]


def _text(value: Any) -> str | bytes:
    return value if isinstance(value, bytes) else str(value)


def _padded(lists: Sequence[list[str | bytes]], width: int) -> np.ndarray[Any, Any]:
    padded = np.full([len(lists), width], "", object)
    for row, values in zip(padded, lists, strict=True):
        row[: len(values)] = values
    return padded


mlflow.models.set_model(Recommender())
