"""Filters to try an exported model with, and which items NumPy says they pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.dataset import Corpus
from recsys.schema import Feature, filter_input

_UNKNOWN = b"\xf0\x9f\xa4\xb7 of no item"
#: Steps through the corpus that meet many items before they come back.
_STEPS = (7, 13)


def probe(
    corpus: Corpus, features: Sequence[Feature], num_queries: int
) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
    """Filter two queries by nothing, two by each feature alone, two by all; and so on.

    Values and ends are those of items here and there, so that some pass few items and some many.

    Args:
        corpus: candidates.
        features: to filter by.
        num_queries: how many.

    Returns:
        Inputs by name, and which items pass, `[num_queries, N]`.
    """
    turn = np.arange(num_queries) // 2 % (len(features) + 2)
    inputs: dict[str, NDArray[Any]] = {}
    passing = np.ones((num_queries, len(corpus)), bool)
    for place, feature in enumerate(features, 1):
        is_asked = (turn == place) | (turn == len(features) + 1)
        values = corpus.features[feature.name]
        if feature.kind == "number":
            asked: NDArray[Any] = _ranges(values, is_asked)
            passes = [_between(values, *ends) for ends in asked]
        else:
            asked = _lists(values, is_asked)
            passes = [np.isin(values, [v for v in row if v]) for row in asked]
        inputs[filter_input(feature.name)] = asked
        passing &= np.array(passes) | ~is_asked[:, np.newaxis]
    return inputs, passing


def _some(values: NDArray[Any], count: int, step: int) -> NDArray[Any]:
    return values[np.arange(count) * step % len(values)]


def _lists(values: NDArray[np.object_], is_asked: NDArray[np.bool_]) -> NDArray[np.object_]:
    """One value, an unknown one and, for every other query, a second value."""
    asked = np.full((len(is_asked), 3), b"", object)
    asked[is_asked, 0] = _some(values, len(is_asked), _STEPS[0])[is_asked]
    asked[is_asked, 1] = _UNKNOWN
    asked[is_asked, 2] = _some(values, len(is_asked), _STEPS[1])[is_asked]
    asked[::2, 2] = b""
    return asked


def _ranges(values: NDArray[np.float32], is_asked: NDArray[np.bool_]) -> NDArray[np.float32]:
    """From an item's number to another's; every third has an open end, which is not a number."""
    both = [_some(values, len(is_asked), step) for step in _STEPS]
    ends = np.sort(np.stack(both, axis=1).astype(np.float32), axis=1)
    ends[::3, 1] = np.inf
    ends[~is_asked] = np.nan
    return ends


def _between(values: NDArray[np.float32], least: float, most: float) -> NDArray[np.bool_]:
    if not np.isfinite(least) and not np.isfinite(most):
        return np.ones(len(values), bool)
    above = values >= least if np.isfinite(least) else ~np.isnan(values)
    below = values <= most if np.isfinite(most) else ~np.isnan(values)
    return above & below
