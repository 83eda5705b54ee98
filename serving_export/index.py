"""Corpus embeddings to an index: exact search, or ScaNN tuned to a recall target and measured.

Built on ScaNN's TensorFlow ops, not on the layer of TFRS: that one knows neither reordering nor
a number of neighbours chosen at call time. Which index for which size, and sqrt(N) leaves, follow
ScaNN's own advice (google-research/scann/docs/algorithms.md).
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from scann.scann_ops.py import scann_ops

from recsys import config
from recsys.artifacts import ArtifactError, IndexReport

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Kind = Literal["brute_force", "hashed", "tree"]

_BRUTE_FORCE_BELOW = 20_000
_HASHED_BELOW = 100_000
_DIMENSIONS_PER_BLOCK = 2
_ANISOTROPIC_THRESHOLD = 0.2
#: Tried in this order: share of the leaves to search, candidates to score exactly per neighbour.
_STEPS = ((0.05, 2), (0.1, 4), (0.2, 4), (0.2, 8), (0.4, 8), (0.4, 16), (0.8, 16), (1.0, 32))
_TIE = 1e-5
_QUERIES_AT_ONCE = 256


class ExactIndex(tf.Module):
    """Dot product with every candidate; stock TensorFlow ops, `batch * num_candidates` floats."""

    def __init__(self, embeddings: Floats) -> None:
        super().__init__()
        self._embeddings = tf.Variable(embeddings, trainable=False, name="embeddings")

    def search(self, queries: tf.Tensor, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Find corpus rows (int32) and scores of the best `count`, both `[batch, <= count]`."""
        scores = tf.matmul(queries, self._embeddings, transpose_b=True)
        best, rows = tf.math.top_k(scores, tf.minimum(count, tf.shape(scores)[1]))
        return rows, best


@dataclass(frozen=True, slots=True)
class _Effort:
    """What a search for `k` neighbours looks at; a search for more looks at more."""

    k: int
    num_leaves: int
    leaves_to_search: int
    reorder: int


class ScannIndex(tf.Module):
    """A ScaNN searcher, kept as tensors, that finds any number of neighbours asked for."""

    def __init__(self, searcher: Any, num_candidates: int, effort: _Effort) -> None:
        super().__init__()
        self._size = num_candidates
        self.effort = effort
        tensors = [_defined(t) for t in scann_ops.scann_to_tensors(searcher.searcher_handle)]
        self.bytes = sum(_num_bytes(t) for t in tensors)
        # Without a name each call site would hold a searcher of its own; a name by content is
        # shared by the signatures of one model and never by two models in one process.
        self._shared_name = "scann-" + _digest(tensors)
        config_, partitioner, tokens, codebook, hashed, int8, multipliers, norms, dataset = (
            tf.Variable(tensor, trainable=False) for tensor in tensors
        )
        # In the order in which the op that restores a searcher takes them.
        self._state = [
            dataset, config_, partitioner, tokens, codebook, hashed, int8, multipliers, norms,
        ]  # fmt: skip

    def search(self, queries: tf.Tensor, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Find corpus rows (int32) and scores of about the best `count` (at least 1).

        Effort grows in proportion to `count`. Where the leaves that were searched hold fewer than
        `count` candidates, all leaves are searched, so that a long list is never cut short.

        Returns:
            Rows and scores, `[batch, min(count, num_candidates)]` (no columns if batch is 0).
        """
        handle = scann_ops.tensors_to_scann(*self._state, shared_name=self._shared_name)
        count = tf.minimum(count, self._size)
        times = tf.maximum(1.0, tf.cast(count, tf.float32) / self.effort.k)
        rows, scores = _search(
            handle, queries, count, self._scaled(self.effort.reorder, times, self._size),
            self._scaled(self.effort.leaves_to_search, times, self.effort.num_leaves),
        )  # fmt: skip
        short = tf.logical_or(
            tf.shape(rows)[1] < count, tf.reduce_any(tf.math.is_nan(scores), axis=None)
        )
        return tf.cond(
            short,
            lambda: _search(handle, queries, count, self._size, self.effort.num_leaves),
            lambda: (rows, scores),
        )

    @staticmethod
    def _scaled(effort: int, times: tf.Tensor, most: int) -> tf.Tensor:
        return tf.minimum(tf.cast(tf.math.ceil(effort * times), tf.int32), most)


def build(
    embeddings: Floats, queries: Floats, target: config.Index
) -> tuple[ScannIndex, IndexReport]:
    """Index the corpus and search as hard as the recall target asks for.

    Clustering starts from k-means++, which ScaNN seeds with a constant: equal embeddings give an
    equal index (its default, random starts, gives another one each time).

    Args:
        embeddings: `[num_candidates, dim]`, compared by dot product.
        queries: held-out query embeddings, `[num_queries, dim]`.
        target: recall at k to reach.

    Raises:
        ArtifactError: no step reaches `target.min_recall`.
    """
    num_candidates = len(embeddings)
    kind, num_leaves = _kind(num_candidates)
    k = min(target.k, num_candidates)
    searcher = _train(embeddings, kind, num_leaves, k)
    kth_best = _kth_best(embeddings, queries, k)
    best = 0.0
    for effort in _efforts(kind, num_candidates, num_leaves, k):
        recall, milliseconds = _measure(searcher, queries, kth_best, effort)
        leaves = f"{effort.leaves_to_search} of {effort.num_leaves} leaves"
        logger.info(
            "index %s, %s, %d reordered: recall@%d %.4f", kind, leaves, effort.reorder, k, recall
        )
        best = max(best, recall)
        if recall >= target.min_recall:
            index = ScannIndex(searcher, num_candidates, effort)
            return index, IndexReport(
                kind=kind,
                parameters=_parameters(kind, effort),
                recall=recall,
                k=k,
                bytes=index.bytes,
                milliseconds_per_query=milliseconds,
            )
    raise ArtifactError(
        f"the {kind} index of {num_candidates} candidates reaches recall@{k} {best:.4f}, "
        f"export.index.min_recall asks for {target.min_recall}: lower it, or raise "
        f"model.embedding_dim, which separates candidates better"
    )


def _kind(num_candidates: int) -> tuple[Kind, int]:
    if num_candidates < _BRUTE_FORCE_BELOW:
        return "brute_force", 1
    if num_candidates < _HASHED_BELOW:
        return "hashed", 1
    return "tree", math.isqrt(num_candidates)


def _train(embeddings: Floats, kind: Kind, num_leaves: int, k: int) -> Any:
    builder = scann_ops.builder(embeddings, k, "dot_product")
    if kind == "brute_force":
        return builder.score_brute_force().build()
    if kind == "tree":
        builder = builder.tree(num_leaves, num_leaves_to_search=num_leaves, random_init=False)
    return (
        builder.score_ah(
            _DIMENSIONS_PER_BLOCK, anisotropic_quantization_threshold=_ANISOTROPIC_THRESHOLD
        )
        .reorder(k)
        .build()
    )


def _efforts(kind: Kind, num_candidates: int, num_leaves: int, k: int) -> list[_Effort]:
    if kind == "brute_force":
        return [_Effort(k, num_leaves, num_leaves, num_candidates)]
    efforts = [
        _Effort(k, num_leaves, math.ceil(share * num_leaves), min(factor * k, num_candidates))
        for share, factor in _STEPS
    ]
    return list(dict.fromkeys(efforts))


def _parameters(kind: Kind, effort: _Effort) -> dict[str, float]:
    if kind == "brute_force":
        return {}
    return {
        "num_leaves": effort.num_leaves,
        "leaves_to_search": effort.leaves_to_search,
        "reorder": effort.reorder,
        "dimensions_per_block": _DIMENSIONS_PER_BLOCK,
        "anisotropic_quantization_threshold": _ANISOTROPIC_THRESHOLD,
    }


def _search(
    handle: tf.Tensor,
    queries: tf.Tensor,
    count: tf.Tensor | int,
    reorder: tf.Tensor | int,
    leaves: tf.Tensor | int,
) -> tuple[tf.Tensor, tf.Tensor]:
    found = scann_ops.scann_search_batched(handle, queries, count, reorder, leaves, False)
    return found.indices, found.distances


def _kth_best(embeddings: Floats, queries: Floats, k: int) -> Floats:
    """Score that a candidate needs to be in the exact top k, `[num_queries]`."""
    parts = [
        np.partition(queries[start : start + _QUERIES_AT_ONCE] @ embeddings.T, -k, axis=1)[:, -k]
        for start in range(0, len(queries), _QUERIES_AT_ONCE)
    ]
    return np.concatenate(parts)


def _measure(
    searcher: Any, queries: Floats, kth_best: Floats, effort: _Effort
) -> tuple[float, float]:
    """Recall at k, by score so that ties count as found, and milliseconds per query."""
    arguments = (effort.k, effort.reorder, effort.leaves_to_search)
    _search(searcher.searcher_handle, queries[:1], *arguments)
    start = time.perf_counter()
    _, scores = _search(searcher.searcher_handle, queries, *arguments)
    milliseconds = 1000 * (time.perf_counter() - start) / len(queries)
    found = np.count_nonzero(scores.numpy() >= kth_best[:, np.newaxis] - _TIE, axis=1)
    return float(np.mean(np.minimum(found, effort.k)) / effort.k), milliseconds


def _defined(tensor: tf.Tensor) -> tf.Tensor:
    # ScaNN leaves the scalars that stand for absent parts uninitialised: zeros repeat, they do not.
    absent = tensor.shape.rank == 0 and tensor.dtype != tf.string
    return tf.zeros_like(tensor) if absent else tensor


def _raw(tensor: tf.Tensor) -> bytes:
    if tensor.dtype == tf.string:
        return b"".join(np.ravel(tensor.numpy()).tolist())
    return tensor.numpy().tobytes()


def _num_bytes(tensor: tf.Tensor) -> int:
    return len(_raw(tensor))


def _digest(tensors: list[tf.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_raw(tensor))
    return digest.hexdigest()[:16]
