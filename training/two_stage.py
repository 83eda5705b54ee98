"""Two stages as one scorer of the whole corpus, so that they are evaluated as all others are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import ArtifactError, Examples, PreparedData, TrainedRanker
from recsys.baselines import Scorer
from recsys.dataset import (
    Corpus,
    Interactions,
    feature_spec,
    named_corruption,
    parse_examples,
    read_interactions,
)
from recsys.models.embed import load_savedmodel
from recsys.ranks import Candidates
from training.embeddings import two_tower_scorer
from training.list_quality import list_quality
from training.outcomes import Outcomes
from training.shown import read_shown

_AT_ONCE = 128

#: Raw query features, corpus rows and scores of the candidates, to `scores`, log odds `[batch,
#: candidates]`, and, with several tasks, their `log_odds` `[batch, candidates, tasks]`.
RankFunction = Callable[
    [Mapping[str, tf.Tensor], NDArray[np.int32], NDArray[np.float32]], Mapping[str, Any]
]


@dataclass(frozen=True, slots=True)
class RankedLists:
    """Candidates of all queries, in the order of retrieval, `[n, candidates]` each.

    Attributes:
        items: corpus rows, -1 for none.
        retrieval: scores of retrieval, -inf for none.
        scores: log odds by the ranker, -inf for none.
        log_odds: by task, `[n, candidates, tasks]`; None without tasks.
    """

    items: NDArray[np.int32]
    retrieval: NDArray[np.float32]
    scores: NDArray[np.float32]
    log_odds: NDArray[np.float32] | None = None


class TwoStages:
    """Scores by which candidates come before all else, ordered by the ranker.

    What is no candidate keeps the order of retrieval: a label among it has the rank it had.
    """

    def __init__(self, retrieval: Scorer, lists: RankedLists) -> None:
        self._retrieval = retrieval
        self._lists = lists

    def scores(self, rows: slice) -> NDArray[np.float32]:
        """Score `[rows, num_items]`."""
        scores = self._retrieval.scores(rows)
        items, ranked = self._lists.items[rows], self._lists.scores[rows]
        # Equal scores leave the order of retrieval, as they do in serving.
        order = np.argsort(np.argsort(-ranked, axis=1, kind="stable"), axis=1)
        raised = scores.max(axis=1, keepdims=True) + items.shape[1] - order
        query, place = np.nonzero(items >= 0)
        scores[query, items[query, place]] = raised[query, place]
        return scores


def rank_lists(
    rank: RankFunction,
    data: PreparedData,
    split: Examples,
    lists: Iterable[Candidates],
    values: Mapping[str, NDArray[np.float32]] | None = None,
) -> RankedLists:
    """Rank the candidates of all queries of a split, given in file order.

    Args:
        rank: the second stage.
        data: that the queries are of.
        split: of them.
        lists: their candidates.
        values: what else `rank` reads of candidates, `[n, candidates]` by name.

    Raises:
        ArtifactError: a shard is corrupt, or a score is not a number.
    """
    spec = feature_spec(data.features.query)
    parts = []
    with named_corruption(data, split):
        records = tf.data.TFRecordDataset(data.files(split)).as_numpy_iterator()
        for block in lists:
            for first in range(0, len(block.items), _AT_ONCE):
                own = slice(first, first + _AT_ONCE)
                items, scores = block.items[own], block.scores[own]
                raw = parse_examples(tf.constant(list(islice(records, len(items)))), spec)
                begin = block.queries.start + first
                raw |= {n: v[begin : begin + len(items)] for n, v in (values or {}).items()}
                answer = rank(raw, items, scores)
                own_parts = [items, scores, answer["scores"]]
                own_parts += [answer["log_odds"]] if "log_odds" in answer else []
                parts.append([np.asarray(part) for part in own_parts])
    ranked = RankedLists(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    if np.isnan(ranked.scores).any():
        raise ArtifactError(
            "the ranker gives scores that are not a number: its training diverged; run "
            "`recsys rank` with a lower ranking.learning_rate"
        )
    return ranked


def impressions(lists: RankedLists, queries: Interactions) -> dict[str, dict[str, float]]:
    """Quality of the lists by scorer, `model` and `retrieval`, see `list_quality`."""
    splits = np.arange(len(queries) + 1) if queries.splits is None else queries.splits
    query = np.repeat(np.arange(len(queries)), np.diff(splits))
    relevant = np.zeros(lists.items.shape, bool)
    hits = (lists.items[query] == queries.label[:, np.newaxis]) & (lists.items[query] >= 0)
    np.logical_or.at(relevant, query, hits)
    present = lists.items >= 0
    scorers = {"model": lists.scores, "retrieval": lists.retrieval}
    return {
        name: list_quality(relevant, present, scores, queries.user)
        for name, scores in scorers.items()
    }


def shown_quality(
    rank: RankFunction, data: PreparedData, corpus: Corpus, towers: Path, candidates: int
) -> dict[str, dict[str, float]]:
    """Quality of the lists that were shown in the test window by scorer, `model` and `retrieval`.

    Scores are those of serving, which knows no positions, but items are as they were when shown.

    Args:
        rank: the second stage, see `rank_function`.
        data: with impressions.
        corpus: of the data.
        towers: the first stage.
        candidates: longer lists are cut.
    """
    assert data.impressions is not None, "asked where the data have shown lists"
    split = data.impressions.test
    shown = read_shown(data, split, corpus, min(data.impressions.longest, candidates))
    queries = read_interactions(data, split, corpus)
    scorer = two_tower_scorer(towers, data, corpus, queries.history, split)
    lists = rank_lists(rank, data, split, shown.scored(scorer), shown.values)
    present = lists.items >= 0
    scorers = {"model": lists.scores, "retrieval": lists.retrieval}
    return {
        name: list_quality(shown.clicked, present, scores, queries.user)
        for name, scores in scorers.items()
    }


def task_quality(
    lists: RankedLists, queries: Interactions, outcomes: Outcomes
) -> dict[str, dict[str, float]]:
    """Quality of the lists by task, by its own log odds and what users did next.

    What is not defined, as the AUC of an event that never came, is left out.
    """
    assert lists.log_odds is not None, "a ranker of several tasks gives the log odds of each"
    relevant = outcomes.of(slice(0, len(queries)), lists.items)
    present = lists.items >= 0
    found = {
        task: list_quality(relevant[..., n], present, lists.log_odds[..., n], queries.user)
        for n, task in enumerate(outcomes.tasks)
    }
    return {t: {m: v for m, v in own.items() if not np.isnan(v)} for t, own in found.items()}


def rank_function(ranker: TrainedRanker, name: str = "rank") -> RankFunction:
    """The ranker of a run.

    Args:
        ranker: of the run.
        name: of the signature; `rank_as_shown` reads numbers of the candidates `as_shown` too.

    Raises:
        ArtifactError: it cannot be loaded.
    """
    folder = ranker.directory / ranker.ranker
    signature = load_savedmodel(folder, name).signatures[name]

    def rank(raw: Mapping[str, tf.Tensor], items: Any, scores: Any) -> Mapping[str, Any]:
        inputs = dict(raw) | {"candidates": items, "retrieval_scores": scores}
        answer: Mapping[str, Any] = signature(
            **{name: tf.constant(value) for name, value in inputs.items()}
        )
        return answer

    return rank


def exported_rank(savedmodel: Path, corpus: Corpus) -> tuple[RankFunction, int] | None:
    """The second stage of an exported model and how many candidates it ranks; None without one.

    Its corpus may be another: what it does not know comes last.
    """
    contract = savedmodel / "assets.extra" / "contract.json"
    if not contract.is_file():
        return None
    described = json.loads(contract.read_text("utf-8")).get("ranking")
    if described is None:
        return None
    signature = load_savedmodel(savedmodel, "rank").signatures["rank"]
    ids = np.append(corpus.item, b"")
    names = set(signature.structured_input_signature[1])

    def rank(raw: Mapping[str, tf.Tensor], items: Any, scores: Any) -> Mapping[str, Any]:
        inputs = {name: value for name, value in raw.items() if name in names}
        found = signature(**inputs, candidates=tf.constant(ids[items], tf.string))["scores"].numpy()
        return {"scores": np.where(np.isneginf(found) & (items >= 0), np.float32(-1e9), found)}

    return rank, int(described["candidates"])
