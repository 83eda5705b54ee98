"""What a searcher finds of the exact top k, and the time it takes."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from serving_export.index import Effort
from serving_export.searcher import Floats, search

#: Scores this close are equal: absolute below 1, relative above.
_TIE = 1e-5
_BATCH = 100
#: Candidates that are compared with a batch at once: 26 MB of scores, however large the corpus.
_ROWS = 65_536


class Sample(NamedTuple):
    """Queries and what they should find.

    Attributes:
        corpus: `[num_candidates, dim]`.
        queries: `[num_queries, dim]`.
        kth_best: score that a candidate needs to be in the exact top k, `[num_queries]`.
    """

    corpus: Floats
    queries: Floats
    kth_best: Floats


def halves(corpus: Floats, queries: Floats, k: int) -> tuple[Sample, Sample]:
    """Split queries into some that tune and some that report; a single one has to do both."""
    middle = len(queries) // 2
    kth_best = _kth_best(corpus, queries, k)
    reported = Sample(corpus, queries[middle:], kth_best[middle:])
    if not middle:
        return reported, reported
    return Sample(corpus, queries[:middle], kth_best[:middle]), reported


def measure(handle: tf.Tensor, effort: Effort, sample: Sample) -> tuple[Floats, float]:
    """Recall at k of each query, `[num_queries]`, and milliseconds of processor time per query.

    Recall counts by true score, so that ties count as found, and so that the rounded scores of
    int8 do not.
    """
    arguments = (effort.k, effort.reorder, effort.leaves_to_search)
    recalls, seconds = [], 0.0
    for start in range(0, len(sample.queries), _BATCH):
        few = slice(start, start + _BATCH)
        queries = tf.constant(sample.queries[few])
        begun = time.process_time()
        rows, scores = (found.numpy() for found in search(handle, queries, *arguments))
        seconds += time.process_time() - begun
        true = np.einsum("qd,qkd->qk", sample.queries[few], sample.corpus[rows])
        # Places for which too few candidates were found hold NaN.
        true[np.isnan(scores)] = -np.inf
        needed = sample.kth_best[few, np.newaxis]
        hits = np.count_nonzero(true >= needed - _TIE * np.maximum(1, np.abs(needed)), axis=1)
        recalls.append(np.minimum(hits, effort.k) / effort.k)
    return np.concatenate(recalls).astype(np.float32), 1000 * seconds / len(sample.queries)


def _kth_best(corpus: Floats, queries: Floats, k: int) -> Floats:
    """Score of the exact k-th best, `[num_queries]`; k is at most the size of the corpus."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    for start in range(0, len(corpus), _ROWS):
        candidates = corpus[start : start + _ROWS].T
        for first in range(0, len(queries), _BATCH):
            few = slice(first, first + _BATCH)
            scores = _largest(queries[few] @ candidates, k)
            best[few] = _largest(np.concatenate([best[few], scores], axis=1), k)
    return best.min(axis=1)


def _largest(scores: Floats, k: int) -> Floats:
    """The k largest of each row in any order; all where there are fewer."""
    return scores if scores.shape[1] <= k else np.partition(scores, -k, axis=1)[:, -k:]
