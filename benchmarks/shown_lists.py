"""The second stage on lists that were shown, beside scikit-learn's logistic regression.

    python benchmarks/shown_lists.py --data ../shared/data --runs /tmp/shown_lists

Every rating of `movielens_latest_small` is an item that was shown, and a click where it is 4 or
more. Both learn the same ratings of the validation window, and choose on the same latest fifth of
it: the ranker its epoch, the regression its regularisation. Both read what is known before the
window or the request: the item's counts and rates, genres and year, the vector that retrieval has
for it, its score and rank by retrieval, and of the user's last 50 ratings the items and whether
they were liked. The regression takes lists as means: how many ratings, which share was liked, the
mean vector of what was liked and of what was not. The test window is read once, by both.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from records import Record, replace
from retrieval_quality import do
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from recsys.artifacts import Examples, PreparedData, TrainedModel, TrainedRanker
from recsys.binary_metrics import auc
from recsys.dataset import Corpus, Interactions, raw_batches, read_corpus, read_interactions
from recsys.features import FeatureEncoder
from recsys.item_statistics import standardised
from recsys.models.ranker_features import KnownItems, RankerFeatures
from training.embeddings import two_tower_scorer
from training.list_quality import list_quality
from training.lists import latest
from training.rank import window_statistics
from training.shown import Shown, read_shown
from training.two_stage import rank_function, rank_lists

DATA = "movielens_latest_small"
CONFIG = "benchmarks/configs/movielens_ratings.yaml"
PEER = "scikit-learn's logistic regression, same features"
#: Inverse strengths of the regularisation, chosen on what is held out.
STRENGTHS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0)
BATCH, SAMPLES = 256, 500


@dataclass(frozen=True, slots=True)
class Window:
    """Shown lists of a window: retrieval's lists of them, and who was asked."""

    split: Examples
    queries: Interactions
    shown: Shown
    scorer: Any


def window(run: Path, data: PreparedData, corpus: Corpus, split: Examples) -> Window:
    """Read the lists of a window, to be scored by the towers of the run."""
    model = TrainedModel.load(run / "model")
    candidates = TrainedRanker.load(run / "ranking").candidates
    assert data.impressions is not None
    shown = read_shown(data, split, corpus, min(data.impressions.longest, candidates))
    queries = read_interactions(data, split, corpus)
    towers = model.directory / model.towers
    return Window(
        split, queries, shown, two_tower_scorer(towers, data, corpus, queries.history, split)
    )


def columns(data: PreparedData, features: RankerFeatures, asked: Window) -> NDArray[np.float32]:
    """What the ranker reads of each shown item, flat: `[items of all lists, columns]`."""
    lists = asked.shown.scored(asked.scorer)
    scores = np.concatenate([block.scores for block in lists])
    parts = []
    for number, raw in enumerate(raw_batches(data, asked.split, BATCH)):
        own = slice(number * BATCH, (number + 1) * BATCH)
        rows = asked.shown.items[own]
        wide = [
            features.statistics(rows).numpy(),
            features.standard_scores(scores[own]).numpy(),
            features.vectors(rows).numpy(),
            *_content(features, rows),
        ]
        query = np.repeat(_user(features, raw)[:, np.newaxis], rows.shape[1], axis=1)
        parts.append(np.concatenate([*wide, query], axis=-1)[rows >= 0])
    return np.concatenate(parts)


def _content(features: RankerFeatures, rows: NDArray[np.int32]) -> Iterator[NDArray[np.float32]]:
    """Features of the items: hashed words as counts, numbers as they are encoded."""
    flat = features.of_candidates(rows.reshape(-1))
    for feature in features.candidate:
        value = flat[feature.name].numpy()
        if feature.is_hashed:
            value = np.eye(feature.buckets + 1, dtype=np.float32)[value].sum(axis=1)[:, 1:]
        yield value.reshape(*rows.shape, -1).astype(np.float32)


def _user(features: RankerFeatures, raw: dict[str, Any]) -> NDArray[np.float32]:
    """The history as means, `[batch, columns]`."""
    encoded = features(raw)
    seen, events = encoded["history"].numpy(), encoded["event_history"].numpy()
    vectors = features.vectors(seen).numpy()
    told = [np.log1p((events > 0).sum(axis=1, keepdims=True))]
    for event in np.arange(1, features.vocabulary_sizes["last_event"]):
        own = (events == event)[..., np.newaxis].astype(np.float32)
        count = np.maximum((events > 0).sum(axis=1, keepdims=True), 1)
        told.append(own.sum(axis=1) / count)
        told.append((vectors * own).sum(axis=1) / np.maximum(own.sum(axis=1), 1))
    return np.concatenate(told, axis=1).astype(np.float32)


def regression(
    train: NDArray[np.float32], clicked: NDArray[np.bool_], held_out: NDArray[np.bool_]
) -> Any:
    """Fit on what is not held out, with the regularisation that is best on what is."""
    fitted = []
    for strength in STRENGTHS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(
            train[~held_out], clicked[~held_out]
        )
        found = auc(clicked[held_out], model.decision_function(train[held_out]))
        print(f"logistic regression, C={strength}: held out AUC {found:.4f}")
        fitted.append((found, model))
    return max(fitted, key=lambda pair: pair[0])[1]


def differences(
    clicked: NDArray[np.bool_], ours: NDArray[Any], theirs: NDArray[Any], users: NDArray[np.int64]
) -> tuple[float, float]:
    """95 % interval of the difference in AUC, users resampled."""
    random = np.random.default_rng(1)
    rows = [np.flatnonzero(users == user) for user in np.unique(users)]
    found = []
    for _ in range(SAMPLES):
        drawn = np.concatenate([rows[i] for i in random.integers(0, len(rows), len(rows))])
        found.append(auc(clicked[drawn], ours[drawn]) - auc(clicked[drawn], theirs[drawn]))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def compared(run: Path) -> Iterator[Record]:
    """Figures of the test window, both from the same lists."""
    data, ranker = PreparedData.load(run / "data"), TrainedRanker.load(run / "ranking")
    assert data.impressions is not None
    corpus = read_corpus(data)
    learned = window(run, data, corpus, data.impressions.validation)
    asked = window(run, data, corpus, data.impressions.test)
    before, after = window_statistics(data, corpus)
    items = KnownItems(corpus, learned.scorer.candidates, standardised(before, before))
    features = RankerFeatures(data.features, FeatureEncoder(data), items)
    present = learned.shown.items >= 0
    scores = np.concatenate([b.scores for b in learned.shown.scored(learned.scorer)])[present]
    features.standardise_scores(float(scores.mean()), float(scores.std()))
    train, clicked = columns(data, features, learned), learned.shown.clicked[present]
    held_out = np.repeat(latest(learned.queries, 0.2, timed=True), present.sum(axis=1))
    model = regression(train, clicked, held_out)
    features.renew(standardised(after, before))
    theirs = model.decision_function(columns(data, features, asked))
    ours = rank_lists(rank_function(ranker), data, asked.split, asked.shown.scored(asked.scorer))
    yield from _records(asked, ours.scores, theirs, (len(train), train.shape[1]))


def _records(
    asked: Window, ours: NDArray[np.float32], flat: NDArray[Any], shape: tuple[int, int]
) -> Iterator[Record]:
    present, clicked = asked.shown.items >= 0, asked.shown.clicked
    theirs = np.zeros(present.shape)
    theirs[present] = flat
    users = np.repeat(asked.queries.user, present.sum(axis=1))
    low, high = differences(clicked[present], ours[present], flat, users)
    found = [list_quality(clicked, present, s, asked.queries.user) for s in (ours, theirs)]
    command = "python benchmarks/shown_lists.py --data ../shared/data --runs /tmp/shown_lists"
    record = partial(Record, data=DATA, command=command, peer=PEER)
    for metric in ("auc", "user_auc", "request_auc", "log_loss", "calibration_error"):
        value, peer_value = (quality[metric] for quality in found)
        what = f"shown lists: test, {found[0]['candidates']:.0f} ratings after {shape[0]}"
        if metric == "auc":
            what += f", difference {value - peer_value:+.4f} ({low:+.4f} to {high:+.4f})"
        target = "0.02 above" if metric == "auc" else ""
        yield record(what=what, metric=metric, value=value, peer_value=peer_value, target=target)


def main() -> None:
    """Train, compare, write the records beside those of `benchmarks/ranking.py`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ["RECSYS_DATA"] = str(arguments.data.resolve())
    run = arguments.runs.resolve() / DATA
    do(["prepare", "--config", CONFIG, "--run-dir", run], run / "data")
    do(["fit", "--run-dir", run], run / "model")
    do(["rank", "--run-dir", run], run / "ranking")
    records = list(compared(run))
    for record in records:
        print(record.what, record.metric, round(record.value, 4), round(record.peer_value or 0, 4))
    replace("ranking", records, lambda row: str(row["what"]).startswith("shown lists"))


if __name__ == "__main__":
    main()
