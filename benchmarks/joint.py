"""Retrieval and ranking jointly beside each of them alone, on `movielens_latest_small`.

    python benchmarks/joint.py --data ../shared/data --runs /tmp/joint

The towers and the head are those of `benchmarks/configs/movielens_ratings.yaml` with `model.joint`;
a rating of 4 or more is a `like`. The weight of the ranking loss is chosen on the validation
window: the best AUC among those that cost no more than 1 % of the retrieval's ndcg@20 there. The
test window is read once, by the chosen weight and by both tasks alone. AUC is that of the shown
lists which `benchmarks/shown_lists.py` judges the second stage on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from records import Record, replace
from retrieval_quality import ROOT, do

from recsys.artifacts import PreparedData, TrainedModel
from recsys.config import load_config
from recsys.dataset import read_corpus, read_interactions
from recsys.metrics import per_query
from recsys.models.embed import embed, in_batches, load_towers
from recsys.ranks import rank_queries
from recsys.run_folder import RunFolder
from training.embeddings import two_tower_scorer
from training.list_quality import list_quality
from training.shown import read_shown
from training.two_stage import rank_lists

DATA = "movielens_latest_small"
CONFIG = "benchmarks/configs/movielens_ratings.yaml"
JOINT = ("model.joint.positive=[like]",)
WEIGHTS = (0.1, 0.3, 1.0)
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


def fitted(runs: Path, name: str, *overrides: str) -> TrainedModel:
    """Train with these settings on the data of all."""
    base, folder = runs / "base", runs / name.replace(" ", "-")
    settings = [part for one in JOINT for part in ("--set", one)]
    do(["prepare", "--config", CONFIG, "--run-dir", base, *settings], base / "data")
    RunFolder(folder).freeze(load_config(ROOT / CONFIG, [*JOINT, *overrides]))
    if not (folder / "data").exists():
        (folder / "data").symlink_to(base / "data")
    do(["fit", "--run-dir", folder], folder / "model")
    return TrainedModel.load(folder / "model")


def validated(model: TrainedModel) -> dict[str, float]:
    """Metrics of the best epoch on the validation window."""
    return {name: curve[model.best_epoch - 1] for name, curve in model.curves.items()}


def chosen(runs: Path, plain: TrainedModel) -> tuple[float, TrainedModel]:
    """The weight that is best on the validation window, and its model."""
    metric = f"ndcg@{K}"
    least = LEAST * validated(plain)[metric]
    models = {w: fitted(runs, f"weight {w}", f"model.joint.weight={w}") for w in WEIGHTS}
    for weight, model in models.items():
        print(f"weight {weight}: validation {validated(model)}; retrieval alone {validated(plain)}")
    kept = [w for w, model in models.items() if validated(model)[metric] >= least]
    # Where all of them cost more, the one that costs least.
    best = max(kept, key=lambda w: validated(models[w])["auc"]) if kept else min(WEIGHTS)
    return best, models[best]


def tested(data: PreparedData, model: TrainedModel) -> dict[str, float]:
    """Retrieval of the test queries, and the head on the lists shown in the test window."""
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
    quality = list_quality(shown.clicked, lists.items >= 0, lists.scores, asked.user)
    return found | {name: quality[name] for name in ("auc", "user_auc", "log_loss")}


def compared(runs: Path) -> Iterator[Record]:
    """Figures of the test window: the joint training beside each task alone."""
    alone = {name: fitted(runs, name, *overrides) for name, overrides in ALONE.items()}
    weight, joint = chosen(runs, alone["retrieval alone"])
    data = PreparedData.load(runs / "base" / "data")
    ours = tested(data, joint)
    theirs = {name: tested(data, model) for name, model in alone.items()}
    what = f"joint: weight {weight:g}, chosen on validation, test"
    record = partial(Record, what=what, data=DATA, command="python benchmarks/joint.py")
    for name, metrics in {
        "retrieval alone": (f"ndcg@{K}", f"recall@{K}"),
        "ranking alone": ("auc", "user_auc", "log_loss"),
    }.items():
        for metric in metrics:
            peer = theirs[name][metric]
            yield record(metric=metric, value=ours[metric], peer=name, peer_value=peer)


def main() -> None:
    """Train, compare, write the records beside those of `benchmarks/ranking.py`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ["RECSYS_DATA"] = str(arguments.data.resolve())
    records = list(compared(arguments.runs.resolve()))
    for record in records:
        print(record.what, record.metric, round(record.value, 4), round(record.peer_value or 0, 4))
    replace("ranking", records, lambda row: str(row["what"]).startswith("joint"))


if __name__ == "__main__":
    main()
