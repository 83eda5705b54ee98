"""Tables of what was shown and of what a new policy would show, as Parquet or CSV.

The log has a row for each choice: `context`, `item`, `propensity`, `reward`. The table of the new
policy has `context`, `item` and its `probability`, a row for each item that it may show there; or
it is the result of `recsys score` (`user`, `items`): the first item of each list is shown. With
`predicted` rewards in both there is a doubly robust estimate too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.artifacts import ArtifactError
from recsys.off_policy import Choices

_SUM_TOLERANCE = 1e-3
_LOG = ("context", "item", "propensity", "reward")


def read_choices(log: Path, target: Path) -> Choices:
    """Join the log with what the new policy does in its contexts.

    Args:
        log: file or folder of Parquet, or a CSV file.
        target: likewise.

    Raises:
        ArtifactError: a file cannot be read, a column is missing, a value cannot be, or the new
            policy says nothing of a context of the log; naming file, column and row.
    """
    shown, policy = _read(log), _policy(_read(target), target)
    _require(shown, _LOG, log)
    if not len(shown):
        raise ArtifactError(f"{log} holds no choice")
    propensity, reward = (_numbers(shown, name, log) for name in ("propensity", "reward"))
    _check(propensity, (propensity > 0) & (propensity <= 1), "propensity", log, "above 0, up to 1")
    modelled = [table for table in (shown, policy) if "predicted" in table.column_names]
    if len(modelled) == 1:
        other = target if modelled[0] is shown else log
        raise ArtifactError(f"{other} has no column 'predicted', which the other table has")
    contexts, code = _codes(shown, policy, log, target)
    probability = _numbers(policy, "probability", target)
    _check(probability, (probability >= 0) & (probability <= 1), "probability", target, "0 to 1")
    policy_code = _places(contexts, policy["context"])
    _check_sums(contexts, policy_code, probability, target)
    by_choice = _probabilities(shown, policy, probability)
    predicted: NDArray[np.float64] | None = None
    expected: NDArray[np.float64] | None = None
    if modelled:
        predicted = _numbers(shown, "predicted", log)
        own = probability * _numbers(policy, "predicted", target)
        known = policy_code >= 0
        total = np.bincount(policy_code[known], own[known], len(contexts))
        expected = total.astype(np.float64)[code]
    return Choices(code, propensity, reward, by_choice, predicted, expected)


def _read(path: Path) -> pa.Table:
    if not path.exists():
        raise ArtifactError(f"{path} does not exist: expected a CSV file, or Parquet")
    try:
        if path.suffix != ".csv":
            return pq.read_table(path)
        # Not as numbers: 0012 is no 12.
        ids = dict.fromkeys(("context", "item", "user"), pa.string())
        return pv.read_csv(path, convert_options=pv.ConvertOptions(column_types=ids))
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(f"{path} cannot be read as CSV (*.csv) or Parquet: {error}") from error


def _policy(table: pa.Table, path: Path) -> pa.Table:
    """`context`, `item`, `probability` and maybe `predicted`."""
    if "items" in table.column_names:
        _require(table, ("user", "items"), path)
        table = table.filter(pc.greater(pc.list_value_length(table["items"]), 0))
        best = pc.list_element(table["items"], 0)
        table = pa.table({"context": table["user"], "item": best})
    _require(table, ("context", "item"), path)
    if "probability" not in table.column_names:
        table = table.append_column("probability", pa.array(np.ones(len(table))))
    return table


def _require(table: pa.Table, names: tuple[str, ...], path: Path) -> None:
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise ArtifactError(
            f"{path} has no column {missing[0]!r}: expected {', '.join(names)}, found "
            f"{', '.join(table.column_names)}"
        )
    for name in names:
        if table[name].null_count:
            row = table[name].is_null().to_pylist().index(True)
            raise ArtifactError(f"{path}, row {row + 1}: {name!r} is missing")


def _numbers(table: pa.Table, name: str, path: Path) -> NDArray[np.float64]:
    try:
        column = table[name].cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise ArtifactError(f"{path}: {name!r} holds no numbers: {error}") from error
    values: NDArray[np.float64] = column.to_numpy()
    _check(values, np.isfinite(values), name, path, "a number")
    return values


def _check(
    values: NDArray[np.float64], valid: NDArray[np.bool_], name: str, path: Path, expected: str
) -> None:
    if not valid.all():
        row = int(np.argmin(valid))
        raise ArtifactError(f"{path}, row {row + 1}: {name}={values[row]:g}, expected {expected}")


def _codes(
    shown: pa.Table, policy: pa.Table, log: Path, target: Path
) -> tuple[pa.Array, NDArray[np.int64]]:
    """Contexts of the log, and which of them each choice is of."""
    context = _texts(shown["context"])
    contexts = pc.unique(context)
    absent = pc.filter(contexts, pc.invert(pc.is_in(contexts, _texts(policy["context"]))))
    if len(absent):
        raise ArtifactError(
            f"{target} says nothing of {len(absent)} of {len(contexts)} contexts in {log}, such as "
            f"{absent[0].as_py()!r}: the new policy has to be asked in all of them"
        )
    return contexts, _places(contexts, context)


def _check_sums(
    contexts: pa.Array, code: NDArray[np.int64], probability: NDArray[np.float64], path: Path
) -> None:
    total = np.bincount(code[code >= 0], probability[code >= 0], len(contexts))
    wrong = np.abs(total - 1) > _SUM_TOLERANCE
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ArtifactError(
            f"{path}: the probabilities of context {contexts[first].as_py()!r} sum to "
            f"{total[first]:g}, expected 1: list every item that the new policy may show"
        )


def _probabilities(
    shown: pa.Table, policy: pa.Table, probability: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Probability of each choice by the new policy, 0 for what it does not list."""
    keys = [_key(table) for table in (shown, policy)]
    places = _places(pc.unique(keys[1]), keys[1])
    total = np.bincount(places, probability)
    found = _places(pc.unique(keys[1]), keys[0])
    return np.where(found >= 0, total[np.maximum(found, 0)], 0.0)


def _key(table: pa.Table) -> Any:
    context, item = _texts(table["context"]), _texts(table["item"])
    # The length keeps apart what runs together.
    length = pc.utf8_length(context).cast(pa.string())
    return pc.binary_join_element_wise(length, context, item, " ")


def _texts(column: pa.ChunkedArray) -> Any:
    """Ids as text, whatever type a Parquet file has."""
    return column.cast(pa.string()).combine_chunks()


def _places(values: Any, sought: Any) -> NDArray[np.int64]:
    """Position of each among values, -1 for what is not there."""
    if isinstance(sought, pa.ChunkedArray):
        sought = _texts(sought)
    found = pc.index_in(sought, values).fill_null(-1)
    places: NDArray[np.int64] = found.to_numpy(zero_copy_only=False).astype(np.int64)
    return places
