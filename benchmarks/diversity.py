"""What maximal marginal relevance costs and brings, on the test split of runs that are there.

    python benchmarks/diversity.py RUN_DIR ... [--pool 100] [--k 10]

Likeness within a list is the mean cosine of all pairs of its items, by the embeddings of the model
itself.
Lists are those of retrieval, ordered by the graph that `export.diversity` puts into a SavedModel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from records import Record, write

from recsys import list_config
from recsys.artifacts import PreparedData, TrainedModel
from recsys.dataset import Interactions, read_corpus, read_interactions
from recsys.metrics import coverage
from recsys.ranks import candidate_lists
from serving_export.diversity import Diversity
from training.embeddings import two_tower_scorer

WEIGHTS = (0.95, 0.9, 0.8, 0.7, 0.5)


def likeness(items: NDArray[np.int32], unit: NDArray[np.float32]) -> float:
    """Mean cosine of all pairs of a list, over lists `[n, k]`."""
    vectors = unit[items]
    k = items.shape[1]
    total = np.square(vectors.sum(axis=1)).sum(axis=1) - np.square(vectors).sum(axis=(1, 2))
    return float((total / (k * (k - 1))).mean())


def ndcg(items: NDArray[np.int32], queries: Interactions) -> float:
    """NDCG of one label a query."""
    hit = items == queries.label[:, np.newaxis]
    return float((hit / np.log2(np.arange(2, items.shape[1] + 2))).sum(axis=1).mean())


def measured(run_dir: Path, pool: int, k: int, command: str) -> Iterator[Record]:
    """Figures of each weight beside those of scores alone."""
    data, model = PreparedData.load(run_dir / "data"), TrainedModel.load(run_dir / "model")
    corpus = read_corpus(data)
    queries = read_interactions(data, data.test, corpus)
    scorer = two_tower_scorer(model.directory / model.towers, data, corpus, queries.history)
    lists = list(candidate_lists("candidates", scorer, queries, len(corpus), pool))
    norms = np.linalg.norm(scorer.candidates, axis=1, keepdims=True)
    unit = scorer.candidates / np.maximum(norms, 1e-12)
    embeddings = tf.Variable(scorer.candidates)

    def of(weight: float) -> dict[str, float]:
        settings = list_config.Diversity(relevance=weight, pool=pool)
        arranged = tf.function(Diversity(settings, embeddings).arranged)
        found = [
            arranged(np.maximum(part.items, 0), part.scores, tf.constant(k))[0][:, :k]
            for part in lists
        ]
        items = np.concatenate([part.numpy() for part in found])
        return {
            f"ndcg@{k}": ndcg(items, queries),
            f"likeness within a list of {k}": likeness(items, unit),
            f"coverage@{k}": coverage(items, len(corpus)),
        }

    plain = of(1.0)
    for weight in WEIGHTS:
        for metric, value in of(weight).items():
            yield Record(
                what=f"relevance {weight:g}, pool {pool}",
                data=f"{run_dir.name}, {len(corpus)} items, {len(queries)} queries",
                metric=metric,
                value=value,
                peer="scores alone",
                peer_value=plain[metric],
                command=command,
            )


def main() -> None:
    """Measure the runs that are named and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--pool", type=int, default=100)
    parser.add_argument("--k", type=int, default=10)
    arguments = parser.parse_args()
    command = " ".join(["python benchmarks/diversity.py", *sys.argv[1:]])
    made = []
    for run_dir in arguments.runs:
        for row in measured(run_dir, arguments.pool, arguments.k, command):
            made.append(row)
            print(f"{row.data} {row.what} {row.metric} {row.value:.4f} ({row.ratio:.3f} of plain)")
    write("diversity", made)


if __name__ == "__main__":
    main()
