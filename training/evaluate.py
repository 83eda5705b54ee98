"""Exact metrics of the towers on the test window, beside the baselines, by slice, with intervals.

Every query ranks the whole corpus, less its own exclusions where the data exclude seen items. A
label that is not in the corpus counts as a miss. Metrics weigh every query alike; where items are
held out, all those of a user are the labels of one query.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recsys.artifacts import (
    MANIFEST,
    RETRIEVAL,
    ArtifactError,
    Estimate,
    EvaluationReport,
    PreparedData,
    TrainedModel,
    TrainedRanker,
    check_same_schema,
)
from recsys.baselines import Scorer, counting_baseline
from recsys.bootstrap import interval, relative_lift, resampled_means
from recsys.config import RunConfig
from recsys.dataset import (
    Corpus,
    Interactions,
    read_corpus,
    read_interactions,
    read_sequences,
)
from recsys.metrics import coverage, novelty, per_query, self_information
from recsys.ranks import Ranking, candidate_lists, rank_queries
from training.als import als_baseline
from training.embeddings import two_tower_scorer
from training.list_quality import CALIBRATION
from training.outcomes import read_outcomes
from training.slices import slices
from training.two_stage import (
    RankedLists,
    RankFunction,
    TwoStages,
    exported_rank,
    impressions,
    rank_function,
    rank_lists,
    shown_quality,
    task_quality,
)

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

_PER_QUERY = "per_query.npz"
_MODEL = "model"


def evaluate(
    config: RunConfig,
    data: PreparedData,
    model: TrainedModel,
    spark: SparkSession | None,
    directory: Path,
    ranker: TrainedRanker | None = None,
) -> EvaluationReport:
    """Evaluate a trained model on the test window of the data it was made for.

    Args:
        config: `evaluation` says which k, baselines and intervals.
        data: from `prepare`.
        model: from `fit`, of the same schema.
        spark: fits `als`; may be None where `als` is no baseline.
        directory: receives `per_query.npz` and, last, the manifest.
        ranker: from `rank`, of the same data. Then two stages are the model, and retrieval alone is
            among the baselines.

    Raises:
        ArtifactError: the model has another schema than the data, or either cannot be read.
    """
    check_same_schema(model, data)
    window = _read(data)
    rankings, lists = _rank_model(config, data, window, model.directory / model.towers, ranker)
    for name in config.evaluation.baselines:
        rankings[name] = _rank(config, window, name, _baseline(config, window, name, spark))
    report = _report(config, data, window, rankings, directory)
    if lists is not None:
        found = impressions(lists, window.queries)
        if lists.log_odds is not None:
            # Its scores are the chance of what `order` names, not of the label alone.
            found["model"] = {m: v for m, v in found["model"].items() if m not in CALIBRATION}
        report = report.model_copy(update={"impressions": found})
    if lists is not None and ranker is not None and ranker.tasks:
        outcomes = read_outcomes(data, data.test, window.corpus, list(ranker.tasks))
        tasks = task_quality(lists, window.queries, outcomes)
        report = report.model_copy(update={"tasks": tasks})
    if ranker is not None and data.impressions is not None:
        towers = model.directory / model.towers
        rank = rank_function(ranker, "rank_as_shown" if data.impressions.values else "rank")
        shown = shown_quality(rank, data, window.corpus, towers, ranker.candidates)
        report = report.model_copy(update={"shown": shown})
    return _write(report, window.queries, rankings)


def evaluate_savedmodel(
    config: RunConfig, data: PreparedData, savedmodel: Path, directory: Path
) -> EvaluationReport:
    """Evaluate any SavedModel with `embed_query` and `embed_candidate`, such as the champion.

    If it has a second stage, that ranks what its towers find. Only the inputs that its signatures
    declare must be in the data; the vocabularies are its own.
    The report has no baselines: they do not depend on the model.

    Raises:
        ArtifactError: the SavedModel reads features that the data lack, or cannot be read.
    """
    window = _read(data)
    scorer = two_tower_scorer(savedmodel, data, window.corpus, window.queries.history)
    second = exported_rank(savedmodel, window.corpus)
    model: Scorer = scorer
    if second is not None:
        model = TwoStages(scorer, _ranked(data, window, scorer, *second))
    rankings = {_MODEL: _rank(config, window, _MODEL, model)}
    return _write(_report(config, data, window, rankings, directory), window.queries, rankings)


@dataclass(frozen=True, slots=True)
class _Window:
    """The test queries, and what was known before them: training examples, validation examples."""

    corpus: Corpus
    queries: Interactions
    known: list[Interactions]


def _read(data: PreparedData) -> _Window:
    if data.test.num_examples == 0:
        raise ArtifactError(f"{data.directory} has no test example; change data.split")
    corpus = read_corpus(data)
    known = [read_sequences(data, data.train, corpus)]
    if data.validation.num_examples:
        known.append(read_interactions(data, data.validation, corpus))
    return _Window(corpus, read_interactions(data, data.test, corpus), known)


def _baseline(config: RunConfig, window: _Window, name: str, spark: SparkSession | None) -> Scorer:
    num_items = len(window.corpus)
    if name == "als":
        return als_baseline(spark, window.known, window.queries, num_items, config.seed)
    return counting_baseline(name, window.known, window.queries, num_items)


def _rank_model(
    config: RunConfig,
    data: PreparedData,
    window: _Window,
    towers: Path,
    ranker: TrainedRanker | None,
) -> tuple[dict[str, Ranking], RankedLists | None]:
    """Rank by the towers, or by both stages and by the towers; then with what the second saw."""
    scorer = two_tower_scorer(towers, data, window.corpus, window.queries.history)
    if ranker is None:
        return {_MODEL: _rank(config, window, _MODEL, scorer)}, None
    check_same_schema(ranker, data)
    lists = _ranked(data, window, scorer, rank_function(ranker), ranker.candidates)
    both: dict[str, Scorer] = {_MODEL: TwoStages(scorer, lists), RETRIEVAL: scorer}
    return {name: _rank(config, window, name, s) for name, s in both.items()}, lists


def _ranked(
    data: PreparedData, window: _Window, scorer: Scorer, rank: RankFunction, candidates: int
) -> RankedLists:
    queries, num_items = window.queries, len(window.corpus)
    lists = candidate_lists("candidates", scorer, queries, num_items, candidates)
    return rank_lists(rank, data, data.test, lists)


def _rank(config: RunConfig, window: _Window, name: str, scorer: Scorer) -> Ranking:
    depth = max(config.evaluation.k)
    num_queries, num_items = len(window.queries), len(window.corpus)
    ranking = rank_queries(name, scorer, window.queries, num_items, depth, config.seed)
    logger.info("%s: ranked %d queries over %d items", name, num_queries, num_items)
    return ranking


def _report(
    config: RunConfig,
    data: PreparedData,
    window: _Window,
    rankings: Mapping[str, Ranking],
    directory: Path,
) -> EvaluationReport:
    settings, corpus, queries = config.evaluation, window.corpus, window.queries
    values = {name: _metrics(r, window, settings.k) for name, r in rankings.items()}
    resamples = {
        name: resampled_means(
            np.stack(list(metrics.values()), axis=1),
            queries.user,
            settings.bootstrap_samples,
            config.seed,
        )
        for name, metrics in values.items()
    }
    estimates = {
        name: _estimates(values[name], resamples[name], settings.confidence)
        | _coverages(ranking, len(corpus), settings.k)
        for name, ranking in rankings.items()
    }
    baselines = [name for name in rankings if name != _MODEL]
    return EvaluationReport(
        directory=directory,
        num_queries=len(queries),
        num_candidates=len(corpus),
        window=(data.test.first_at, data.test.last_at),
        data_fingerprint=data.fingerprint,
        model=estimates[_MODEL],
        baselines={name: estimates[name] for name in baselines},
        lifts={
            name: _lifts(
                values[_MODEL],
                values[name],
                resamples[_MODEL],
                resamples[name],
                settings.confidence,
            )
            for name in baselines
        },
        slices=slices(values[_MODEL], queries, rankings[_MODEL].rank, window.known[0], corpus),
        per_query=_PER_QUERY,
    )


def _metrics(
    ranking: Ranking, window: _Window, ks: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    information = self_information(window.corpus.count)
    novelties = {f"novelty@{k}": novelty(ranking.recommended[:, :k], information) for k in ks}
    return per_query(ranking.rank, ks, window.queries.splits) | novelties


def _estimates(
    values: Mapping[str, NDArray[np.float64]], resamples: NDArray[np.float64], confidence: float
) -> dict[str, Estimate]:
    return {
        metric: interval(float(value.mean()), resamples[:, column], confidence)
        for column, (metric, value) in enumerate(values.items())
    }


def _coverages(ranking: Ranking, num_items: int, ks: Sequence[int]) -> dict[str, Estimate]:
    # Coverage belongs to all lists together and is no mean over queries. Resampled users cover
    # less than all users do, so a bootstrap would miss the value itself: no interval.
    shares = {k: coverage(ranking.recommended[:, :k], num_items) for k in ks}
    return {f"coverage@{k}": Estimate(value=s, low=s, high=s) for k, s in shares.items()}


def _lifts(
    model: Mapping[str, NDArray[np.float64]],
    baseline: Mapping[str, NDArray[np.float64]],
    model_resamples: NDArray[np.float64],
    baseline_resamples: NDArray[np.float64],
    confidence: float,
) -> dict[str, Estimate]:
    """Relative lifts of the accuracy metrics; more novelty is another list, not a better one."""
    lifts = {}
    for column, (metric, value) in enumerate(model.items()):
        if metric.startswith("novelty"):
            continue
        both = model_resamples[:, column], baseline_resamples[:, column]
        lift = relative_lift(value.mean(), baseline[metric].mean(), len(value))
        lifts[metric] = interval(lift, relative_lift(*both, len(value)), confidence)
    return lifts


def _write(
    report: EvaluationReport, queries: Interactions, rankings: Mapping[str, Ranking]
) -> EvaluationReport:
    report.directory.mkdir(parents=True, exist_ok=True)
    # A manifest of an earlier evaluation must not stand beside ranks of this one.
    (report.directory / MANIFEST).unlink(missing_ok=True)
    arrays: dict[str, Any] = {"user": queries.user, "label": queries.label}
    if queries.splits is not None:
        arrays["splits"] = queries.splits
    arrays |= {f"rank_{name}": ranking.rank for name, ranking in rankings.items()}
    np.savez_compressed(report.directory / report.per_query, **arrays)
    return report.save()
