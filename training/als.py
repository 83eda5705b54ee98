"""Implicit-feedback matrix factorisation by Spark ML, served to any history by fold-in.

Hu, Koren and Volinsky, "Collaborative Filtering for Implicit Feedback Datasets", ICDM 2008. Spark
learns the item factors. The factors of a query are solved from its own history, so that users
without a training example and clicks after the training are served as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.dataset import Interactions
from recsys.popularity import popularity_levels

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_RANK = 64
_ITERATIONS = 10
_ALPHA = 40.0  # confidence 1 + alpha * weight: the value of the paper
_PAIRS_PER_BLOCK = 50_000  # Spark's ten blocks make tasks of milliseconds out of small data
_REGULARIZATION = 0.1  # times the number of a user's items, as Spark scales it


class AlsScorer:
    """Scores of ALS item factors for queries whose factors are folded in from their histories.

    A query without history gets the items by popularity.

    Args:
        factors: `[num_items, rank]`, zeros for items that ALS has not seen.
        known: splits the factors were learned from.
        queries: split whose histories are folded in.
    """

    def __init__(
        self, factors: NDArray[np.float32], known: Sequence[Interactions], queries: Interactions
    ) -> None:
        self._factors = factors
        self._history = queries.history
        self._gram = factors.T.astype(np.float64) @ factors
        self._levels = popularity_levels(known, len(factors))

    def scores(self, rows: slice) -> NDArray[np.float32]:
        """Score `[rows, num_items]`: predicted preference, about 0 to 1."""
        history = self._history[rows]
        users = fold_in(history, self._factors, self._gram)
        block: NDArray[np.float32] = users.astype(np.float32) @ self._factors.T
        block[~(history >= 0).any(axis=1)] = self._levels
        return block


def als_baseline(
    spark: SparkSession | None,
    known: Sequence[Interactions],
    queries: Interactions,
    num_items: int,
    seed: int,
) -> AlsScorer:
    """Fit ALS on what is known before the test window.

    Raises:
        ValueError: there is no Spark session.
    """
    if spark is None:
        raise ValueError(
            "evaluation.baselines has `als`, which Spark fits, but there is no Spark session: "
            "start one (pip install 'clickstream-recommender[spark]') or remove `als`"
        )
    table = user_item_weights(known, num_items)
    return AlsScorer(fit_item_factors(spark, table, num_items, seed), known, queries)


def user_item_weights(known: Sequence[Interactions], num_items: int) -> pa.Table:
    """One row per user and item: `user` and `item` as the int32 codes that Spark ML asks for.

    `weight` sums the weights of the user's labels. An item that is in the user's histories without
    ever being a label (the first click of a session) has weight 1.
    """
    user = _codes(known)
    label = np.concatenate([split.label for split in known])
    history = np.concatenate([split.history for split in known])
    weight = np.concatenate([split.weight for split in known]).astype(np.float64)
    in_corpus = label >= 0
    labelled = user[in_corpus] * num_items + label[in_corpus]
    rows, positions = np.nonzero(history >= 0)
    viewed = np.setdiff1d(user[rows] * num_items + history[rows, positions], labelled)
    pairs, group = np.unique(np.concatenate([labelled, viewed]), return_inverse=True)
    weights = np.bincount(group, np.concatenate([weight[in_corpus], np.ones(len(viewed))]))
    return pa.table(
        {
            "user": pa.array(pairs // num_items, pa.int32()),
            "item": pa.array(pairs % num_items, pa.int32()),
            "weight": pa.array(weights, pa.float64()),
        }
    )


def _codes(known: Sequence[Interactions]) -> NDArray[np.int64]:
    """Codes of the users over all splits, whose own codes are not comparable."""
    ids = np.concatenate([split.user_id for split in known]).astype(bytes)
    return np.unique(ids, return_inverse=True)[1].astype(np.int64)


def fit_item_factors(
    spark: SparkSession, table: pa.Table, num_items: int, seed: int
) -> NDArray[np.float32]:
    """Item factors `[num_items, rank]`; zeros for items without a row in the table."""
    from pyspark.ml.recommendation import ALS

    blocks = min(10, 1 + table.num_rows // _PAIRS_PER_BLOCK)
    als = ALS(
        rank=min(_RANK, num_items),
        maxIter=_ITERATIONS,
        regParam=_REGULARIZATION,
        implicitPrefs=True,
        alpha=_ALPHA,
        numUserBlocks=blocks,
        numItemBlocks=blocks,
        userCol="user",
        itemCol="item",
        ratingCol="weight",
        seed=seed,
    )
    learned = als.fit(spark.createDataFrame(table)).itemFactors.toArrow()
    factors = np.zeros((num_items, als.getRank()), np.float32)
    factors[learned["id"].to_numpy()] = np.stack(learned["features"].to_numpy())
    return factors


def fold_in(
    history: NDArray[np.int32], factors: NDArray[np.float32], gram: NDArray[np.float64]
) -> NDArray[np.float64]:
    """User factors from histories: `(YtY + Yt (C - I) Y + lambda I)^-1 Yt C p` (equation 4).

    Repeated items raise the confidence. Lambda is Spark's: regularisation times distinct items, so
    a training user's own items give the factors that Spark has for it.

    Args:
        history: `[n, length]` corpus rows, -1 at the end.
        factors: Y, `[num_items, rank]`.
        gram: YtY, `[rank, rank]`.

    Returns:
        `[n, rank]`; zeros for an empty history.
    """
    rank = factors.shape[1]
    valid = history >= 0
    repeated = np.tril(history[:, :, None] == history[:, None, :], -1).any(axis=2)
    first = valid & ~repeated
    items = np.where(valid[..., None], factors[history], 0).astype(np.float64)
    confidence = _ALPHA * items.transpose(0, 2, 1) @ items
    distinct = np.maximum(first.sum(axis=1), 1)[:, None, None]
    left = gram + confidence + _REGULARIZATION * distinct * np.eye(rank)
    right = (items * (_ALPHA * valid + first)[..., None]).sum(axis=1)
    return np.linalg.solve(left, right[..., None])[..., 0]
