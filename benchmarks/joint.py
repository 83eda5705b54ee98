"""Retrieval and ranking jointly beside each of them alone, on `movielens_latest_small`.

    python benchmarks/joint.py --data ../shared/data --runs /tmp/joint

The towers and the head are those of `benchmarks/configs/movielens_ratings.yaml` with `model.joint`;
a rating of 4 or more is a `like`. The weight of the ranking loss is chosen on the validation
window, with the first seed: the best AUC among those that cost no more than 1 % of the retrieval's
ndcg@20 there. The test window is read once, by the chosen weight and by both tasks alone.
AUC is that of the shown lists which `benchmarks/shown_lists.py` judges the second stage on; there
the scores of the retrieval alone, its dot products, are a peer too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from records import Record, write
from retrieval_quality import ROOT, do

from recsys.artifacts import PreparedData, TrainedModel
from recsys.config import load_config
from recsys.dataset import read_corpus, read_interactions
from recsys.metrics import per_query
from recsys.models.embed import embed, in_batches, load_towers
from recsys.ranks import rank_queries
from recsys.run_folder import RunFolder
from training.embeddings import two_tower_scorer
from training.fit import fit
from training.list_quality import list_quality
from training.shown import read_shown
from training.two_stage import rank_lists

DATA = "movielens_latest_small"
CONFIG = "benchmarks/configs/movielens_ratings.yaml"
JOINT = ("model.joint.positive=[like]",)
WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0)
SEEDS = (1, 2, 3)
#: Share of the retrieval's metric that a joint training must keep on the validation window.
LEAST = 0.99
K = 20
ALONE = {
    "retrieval alone": ("model.joint.weight=0",),
    "ranking alone": (
        "model.joint.weight=1",
        "model.joint.retrieval_weight=0",
        "train.monitor=auc",
    ),
}
#: What each of the tasks alone is a peer in, on the test window.
PEERS = {
    "retrieval alone": (f"ndcg@{K}", f"recall@{K}", "auc", "user_auc"),
    "ranking alone": (f"ndcg@{K}", "auc", "user_auc", "log_loss"),
}


def fitted(
    runs: Path, name: str, *overrides: str, seeds: Sequence[int] = SEEDS
) -> list[TrainedModel]:
    """Train with these settings, once for each seed, on the data of all; not what is finished."""
    base, models = runs / "base", []
    settings = [part for one in JOINT for part in ("--set", one)]
    do(["prepare", "--config", CONFIG, "--run-dir", base, *settings], base / "data")
    data = PreparedData.load(base / "data")
    for seed in seeds:
        folder = runs / f"{name} {seed}".replace(" ", "-")
        config = load_config(ROOT / CONFIG, [*JOINT, *overrides, f"seed={seed}"])
        # Refuses figures of other settings.
        RunFolder(folder).freeze(config)
        if not TrainedModel.exists(folder / "model"):
            fit(config, data, folder / "model")
        models.append(TrainedModel.load(folder / "model"))
    print(f"{name}: validation", {m: round(v, 4) for m, v in validated(models).items()}, flush=True)
    return models


def validated(models: list[TrainedModel]) -> dict[str, float]:
    """Metrics of the best epoch on the validation window, means of the seeds."""
    metrics = (f"ndcg@{K}", f"recall@{K}", "auc")
    return {m: mean(model.curves[m][model.best_epoch - 1] for model in models) for m in metrics}


def chosen(runs: Path, plain: TrainedModel) -> float:
    """The weight that is best on the validation window, with the first seed."""
    metric, found = f"ndcg@{K}", {}
    least = LEAST * validated([plain])[metric]
    for weight in WEIGHTS:
        models = fitted(runs, f"weight {weight}", of(weight), seeds=SEEDS[:1])
        found[weight] = validated(models)
    kept = [weight for weight, metrics in found.items() if metrics[metric] >= least]
    # Where all of them cost more, the one that costs least.
    return max(kept, key=lambda weight: found[weight]["auc"]) if kept else min(WEIGHTS)


def of(weight: float) -> str:
    """The override that weighs the ranking loss so."""
    return f"model.joint.weight={weight}"


def tested(data: PreparedData, model: TrainedModel) -> dict[str, dict[str, float]]:
    """Retrieval of the test queries; the shown lists of the test window by head and dot product."""
    corpus, folder = read_corpus(data), model.directory / model.towers
    queries = read_interactions(data, data.test, corpus)
    scorer = two_tower_scorer(folder, data, corpus, queries.history)
    ranks = rank_queries("model", scorer, queries, len(corpus), K, seed=1).rank
    found = {name: float(v.mean()) for name, v in per_query(ranks, [K]).items()}
    assert data.impressions is not None
    split, longest = data.impressions.test, data.impressions.longest
    shown, asked = read_shown(data, split, corpus, longest), read_interactions(data, split, corpus)
    towers = load_towers(folder)
    items = embed(towers, "embed_candidate", in_batches(corpus.features))["embedding"]

    def rank(raw: Mapping[str, Any], rows: NDArray[np.int32], scores: Any) -> dict[str, Any]:
        query = embed(towers, "embed_query", [raw])["embedding"]
        vectors = tf.constant(items[np.maximum(rows, 0)])
        odds = towers.signatures["log_odds"](queries=tf.constant(query), candidates=vectors)
        return {"scores": np.where(rows >= 0, odds["log_odds"], np.float32(-np.inf))}

    own = two_tower_scorer(folder, data, corpus, asked.history, split)
    lists = rank_lists(rank, data, split, shown.scored(own))
    quality = partial(list_quality, shown.clicked, lists.items >= 0, users=asked.user)
    return {
        "head": found | quality(scores=lists.scores),
        "dot product": found | quality(scores=lists.retrieval),
    }


def compared(runs: Path) -> Iterator[Record]:
    """Figures of the test window: the joint training beside each task alone."""
    alone = {name: fitted(runs, name, *overrides) for name, overrides in ALONE.items()}
    weight = chosen(runs, alone["retrieval alone"][0])
    joint = fitted(runs, f"weight {weight}", of(weight))
    data = PreparedData.load(runs / "base" / "data")
    ours = [tested(data, model)["head"] for model in joint]
    command = "python benchmarks/joint.py --data ../shared/data --runs /tmp/joint"
    record = partial(Record, data=DATA, command=command)
    for name, metrics in PEERS.items():
        by = "dot product" if name == "retrieval alone" else "head"
        theirs = [tested(data, model)[by] for model in alone[name]]
        for metric in metrics:
            pairs = [(a[metric], b[metric]) for a, b in zip(ours, theirs, strict=True)]
            ratios = [a / b for a, b in pairs]
            what = f"weight {weight:g}, chosen on validation, test, mean of {len(SEEDS)} "
            what += f"seeds, ratios {min(ratios):.3f} to {max(ratios):.3f}"
            value, peer_value = (mean(column) for column in zip(*pairs, strict=True))
            peer = f"{name}, dot product" if "auc" in metric and by != "head" else name
            yield record(what=what, metric=metric, value=value, peer=peer, peer_value=peer_value)


def main() -> None:
    """Train, compare, write the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ["RECSYS_DATA"] = str(arguments.data.resolve())
    records = list(compared(arguments.runs.resolve()))
    for record in records:
        print(record.what, record.metric, round(record.value, 4), record.peer, record.peer_value)
    write("joint", records)


if __name__ == "__main__":
    main()
