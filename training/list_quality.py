"""How well a scorer orders lists of candidates, and whether its scores can be believed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.binary_metrics import auc, expected_calibration_error, grouped_auc, log_loss

#: Metrics of `list_quality` that take scores for log odds.
CALIBRATION = ("log_loss", "calibration_error")
_K = 10


def list_quality(
    relevant: NDArray[np.bool_],
    present: NDArray[np.bool_],
    scores: NDArray[np.floating[Any]],
    users: NDArray[np.integer[Any]],
) -> dict[str, float]:
    """Metrics over the candidates of all lists.

    `auc` compares all candidates, `user_auc` those of one user, `request_auc` those of one list.
    `log_loss` and `calibration_error` take scores for log odds. `ndcg@10` and `mrr` are means over
    the lists that hold a relevant item: of what can be ordered at all.

    Args:
        relevant: `[n, candidates]` which candidate is a label.
        present: `[n, candidates]` which place holds a candidate.
        scores: `[n, candidates]`.
        users: `[n]` codes.
    """
    flat, labels = scores[present], relevant[present]
    width = np.count_nonzero(present, axis=1)
    requests = np.arange(len(relevant))
    return {
        "candidates": float(len(labels)),
        "positives": float(np.count_nonzero(labels)),
        "auc": auc(labels, flat),
        "user_auc": grouped_auc(labels, flat, np.repeat(users, width)),
        "request_auc": grouped_auc(labels, flat, np.repeat(requests, width)),
        "log_loss": log_loss(labels, flat),
        "calibration_error": expected_calibration_error(labels, flat),
    } | _order(relevant & present, np.where(present, scores, -np.inf))


def _order(relevant: NDArray[np.bool_], scores: NDArray[np.floating[Any]]) -> dict[str, float]:
    """Mean NDCG@10 and MRR of the lists with a relevant item; ties go against the label."""
    some = relevant.any(axis=1)
    if not some.any():
        return {f"ndcg@{_K}": 0.0, "mrr": 0.0}
    relevant, scores = relevant[some], scores[some]
    # Among equal scores what is not relevant comes first: a constant scorer earns nothing.
    order = np.lexsort((relevant, -scores), axis=1)
    hits = np.take_along_axis(relevant, order, axis=1)
    discount = 1 / np.log2(np.arange(2, _K + 2))
    gain = hits[:, :_K] @ discount[: hits.shape[1]]
    ideal = np.cumsum(discount)[np.minimum(relevant.sum(axis=1), _K) - 1]
    return {
        f"ndcg@{_K}": float((gain / ideal).mean()),
        "mrr": float((1 / (hits.argmax(axis=1) + 1)).mean()),
    }
