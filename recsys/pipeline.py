"""The steps of a run in their order: which manifest each reads and which it leaves.

Together with `recsys.cli` this is the composition root: the only place that knows `training` and
`serving_export` at once. Both are imported inside the steps, so a server needs no Spark.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from recsys.artifacts import (
    MANIFEST,
    ArtifactError,
    EvaluationReport,
    ExportedModel,
    Manifest,
    PreparedData,
    Promotion,
    RegisteredModel,
    Scoring,
    TrainedModel,
    TrainedRanker,
)
from recsys.config import ConfigError, RunConfig
from recsys.overrides import check_space, check_tunable
from recsys.run_folder import RunFolder
from recsys.steps import STEPS, steps_of
from recsys.summary import (
    Recommendation,
    decision_lines,
    export_lines,
    impressions_table,
    lifts_table,
    metrics_table,
    recommendation_lines,
    slices_table,
    trials_table,
    tuning_lines,
)

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import SparkSession

    from training.tracking import Tracker

logger = logging.getLogger(__name__)

#: Folder of `tune`, which stands beside the steps: it reads what `prepare` made, changes nothing.
TUNING = "tuning"
_SHOWN_USERS = 3
_SHOWN_ITEMS = 5
M = TypeVar("M", bound=Manifest)


class Run:
    """A run folder with its config, and the steps that work on it."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        self.folder = folder
        self.config = config
        self._spark: SparkSession | None = None
        self._started_spark = False
        self._tracker: Tracker | None = None

    def preflight(self) -> None:
        """Find within seconds what would fail later: space, columns, Java, tracking server."""
        check_space(self.config)
        from training.prepare.columns import check_columns
        from training.session import check_java

        check_columns(self.config)
        check_java()
        # MLflow takes seconds to import; a wrong column should be told before that.
        from training.tracking import check_reachable, tracking_uri

        check_reachable(tracking_uri(self.config.cluster, self.folder.path))

    @property
    def steps(self) -> list[str]:
        """The steps of this run in their order."""
        return steps_of(self.config)

    def do(self, step: str, again: bool = False) -> None:
        """Do one step, unless it is finished and not wanted `again`.

        A failure marks the MLflow run; the next attempt continues the same run.

        Raises:
            ConfigError: the config does not have this step.
        """
        if step not in self.steps:
            raise ConfigError(f"{step}: the config has no `ranking` section, so nothing is ranked")
        directory = self.directory(step)
        if STEPS[step][1].exists(directory) and not again:
            logger.info("%s: finished before, in %s", step, directory)
            return
        self._invalidate(step)
        started = time.monotonic()
        with self._tracked():
            getattr(self, f"_{step}")(directory)
        logger.info("%s: done in %.0f s", step, time.monotonic() - started)

    def tune(self, trials: int | None = None) -> str:
        """Prepare if needed, search for better settings, tell the best; change no other step.

        Args:
            trials: how many the study shall have in all; `tune.trials` when not given.

        Raises:
            ArtifactError: Optuna is not installed.
            ConfigError: `tune.space` is empty or does not fit the config.
        """
        try:
            from training.tune import tune
        except ModuleNotFoundError as error:
            if error.name != "optuna":
                raise
            raise ArtifactError(
                "`recsys tune` needs Optuna: pip install 'clickstream-recommender[tuning]'"
            ) from error
        check_tunable(self.config)
        self.do("prepare")
        data = self.load("prepare", PreparedData)
        with self._tracked():
            report = tune(self.config, data, self.folder.step(TUNING), self.tracker, trials)
        return "\n\n".join([trials_table(report), tuning_lines(report, self.folder.path)])

    def finish(self) -> None:
        """Stop Spark, unless it was there before: then others may work in it."""
        if self._spark is not None and self._started_spark:
            self._spark.stop()
            self._spark = None

    def directory(self, step: str) -> Path:
        """Folder of a step."""
        return self.folder.step(STEPS[step][0])

    def load(self, step: str, kind: type[M]) -> M:
        """Manifest of a finished step."""
        return kind.load(self.directory(step))

    @property
    def spark(self) -> SparkSession:
        """The Spark session, started when a step first needs it."""
        from training.session import has_session, spark_session

        if self._spark is None:
            self._started_spark = not has_session()
            self._spark = spark_session(self.config.cluster, self.config.name)
        return self._spark

    @property
    def tracker(self) -> Tracker:
        """The MLflow run of this folder, opened when a step first needs it."""
        from training.tracking import Tracker

        if self._tracker is None:
            self._tracker = Tracker.open(self.config, self.folder.path, self.folder.token())
        return self._tracker

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        """Close the MLflow run after a step: each may be the last that this process does."""
        try:
            yield
        except BaseException:
            self._close_tracker("FAILED")
            raise
        self._close_tracker("FINISHED")

    def _close_tracker(self, status: str) -> None:
        if self._tracker is not None:
            self._tracker.set_status(status)
            self._tracker = None

    def _connect_registry(self) -> None:
        """Point the registry at the tracking store, without opening the MLflow run."""
        from serving_export.registry import connect
        from training.tracking import tracking_uri

        connect(tracking_uri(self.config.cluster, self.folder.path))

    def summary(self) -> str:
        """What the run has brought so far, for a person."""
        report = self.load("evaluate", EvaluationReport)
        metric = self.config.registry.gate.metric
        parts = [
            f"{self.config.name}: {report.num_queries} test queries over {report.num_candidates} "
            f"items, seen items {'excluded' if self.config.data.exclude_seen else 'allowed'}",
            metrics_table(report, int(metric.split("@")[1])),
            lifts_table(report, metric),
            slices_table(report.slices, metric),
        ]
        if report.impressions:
            parts.insert(3, impressions_table(report.impressions))
        if RegisteredModel.exists(self.directory("register")):
            registered = self.load("register", RegisteredModel)
            lines = export_lines(self.load("export", ExportedModel))
            promotion = self._if_finished("promote", Promotion)
            lines += decision_lines(registered, promotion, self._if_finished("score", Scoring))
            shown = self._ask(f"{registered.name}/{registered.model_version}", None, _SHOWN_ITEMS)
            parts += ["\n".join(lines), "\n".join(recommendation_lines(shown))]
        return "\n\n".join(parts)

    def recommend(self, user: str, k: int, alias: str) -> str:
        """Recommendations of a registered model to one user of this run, readable.

        Raises:
            ArtifactError: the run has no such user, or the registry no such alias.
        """
        shown = self._ask(f"{self.config.registry.model}@{alias}", user, k)
        return "\n".join(recommendation_lines(shown))

    def _ask(self, model: str, user: str | None, k: int) -> list[Recommendation]:
        """Ask a registered model for one user, or for a few that have a history."""
        from recsys.dataset import read_corpus
        from serving_export.registry import recommend

        self._connect_registry()
        data = self.load("prepare", PreparedData)
        queries = _queries(data, user)
        corpus = read_corpus(data)
        names = {i.decode(): n.decode() for i, n in zip(corpus.item, corpus.name, strict=True)}
        answers = recommend(model, queries.drop(columns="user"), k)
        histories = [f.name for f in data.features.item_histories[:1]]
        pasts = list(queries[histories[0]]) if histories else [[] for _ in answers.index]
        return [
            Recommendation(
                user=who,
                history=[names.get(item, item) for item in past],
                items=[(names.get(i, i), score) for i, score in zip(ids, scores, strict=True)],
            )
            for who, past, ids, scores in zip(
                queries["user"], pasts, answers["ids"], answers["scores"], strict=True
            )
        ]

    def _if_finished(self, step: str, kind: type[M]) -> M | None:
        return self.load(step, kind) if kind.exists(self.directory(step)) else None

    def _invalidate(self, step: str) -> None:
        """Remove a finished result that is made again, and what later steps made of it.

        What a killed attempt left stays: each step knows how to go on from there.
        """
        names = list(STEPS)
        stale = [self.directory(later) for later in names[names.index(step) + 1 :]]
        if STEPS[step][1].exists(self.directory(step)):
            stale.append(self.directory(step))
        if step == "prepare":
            stale.append(self.folder.step(TUNING))
        for directory in stale:
            # First, so that a kill in the middle leaves nothing that looks finished.
            (directory / MANIFEST).unlink(missing_ok=True)
        for directory in filter(Path.is_dir, stale):
            shutil.rmtree(directory)

    def _prepare(self, directory: Path) -> None:
        from training.prepare import prepare

        prepare(self.config, self.spark, directory)

    def _fit(self, directory: Path) -> None:
        from training.distribute import launch
        from training.fit import fit

        # Executors have another working directory.
        directory = directory.resolve()
        data = PreparedData.load(self.directory("prepare").resolve())
        self.tracker.log_config(self.config)
        if self.config.cluster.kind == "spark":
            self.tracker.log_application(self.spark.sparkContext.applicationId)
        launch(
            fit,
            self.config.cluster,
            self.config,
            data,
            directory,
            self.tracker.run_id,
            self.tracker.log_metrics,
            folder=directory,
            spark=lambda: self.spark,
        )

    def _rank(self, directory: Path) -> None:
        from training.rank import rank

        data, model = self.load("prepare", PreparedData), self.load("fit", TrainedModel)
        ranker = rank(self.config, data, model, directory)
        self.tracker.log_metrics(
            {f"ranker/held_out/{name}": v for name, v in ranker.held_out["ranker"].items()}
        )

    def _evaluate(self, directory: Path) -> None:
        from training.evaluate import evaluate

        data, model = self.load("prepare", PreparedData), self.load("fit", TrainedModel)
        spark = self.spark if "als" in self.config.evaluation.baselines else None
        report = evaluate(self.config, data, model, spark, directory, self._ranker())
        self.tracker.log_metrics(_test_metrics(report))
        folders = ["data", "model", *(["ranking"] if self.config.ranking else []), "evaluation"]
        for name in folders:
            self.tracker.log_artifact(self.folder.step(name) / MANIFEST, name)

    def _export(self, directory: Path) -> None:
        from serving_export.savedmodel import export

        data, model = self.load("prepare", PreparedData), self.load("fit", TrainedModel)
        export(self.config, data, model, directory, self._ranker())

    def _ranker(self) -> TrainedRanker | None:
        return None if self.config.ranking is None else self.load("rank", TrainedRanker)

    def _register(self, directory: Path) -> None:
        from serving_export.registry import register

        self._connect_registry()
        exported = self.load("export", ExportedModel)
        report = self.load("evaluate", EvaluationReport)
        register(self.config, exported, report, self.tracker.run_id, directory)

    def _promote(self, directory: Path) -> None:
        from serving_export.registry import champion, promote
        from training.evaluate import evaluate_savedmodel

        registered = self.load("register", RegisteredModel)
        report = self.load("evaluate", EvaluationReport)
        self._connect_registry()
        present = champion(self.config, directory)
        rival, obstacle = None, ""
        if present is not None and present.version != registered.model_version:
            data = self.load("prepare", PreparedData)
            try:
                rival = evaluate_savedmodel(self.config, data, present.path, directory / "champion")
            except ArtifactError as error:
                obstacle = str(error)
        promote(self.config, registered, report, rival or obstacle, directory)

    def _score(self, directory: Path) -> None:
        from serving_export.batch import score
        from serving_export.registry import find_champion

        self._connect_registry()
        if find_champion(self.config.registry.model) is None:
            logger.warning("nothing is scored: no version of the model has passed the gate yet")
            return
        data = self.load("prepare", PreparedData)
        score(self.config, self.spark, str((data.directory / data.users).resolve()), directory)


def _test_metrics(report: EvaluationReport) -> dict[str, float]:
    scorers = {"test": report.model} | {
        f"baseline/{name}": metrics for name, metrics in report.baselines.items()
    }
    estimates = {
        f"{scorer}/{metric}": estimate.value
        for scorer, metrics in scorers.items()
        for metric, estimate in metrics.items()
    }
    return estimates | {
        f"impressions/{scorer}/{metric}": value
        for scorer, metrics in report.impressions.items()
        for metric, value in metrics.items()
    }


def _queries(data: PreparedData, user: str | None) -> pd.DataFrame:
    """Query features of one user, or of the first few users with the longest histories."""
    import pyarrow.parquet as pq

    folder = data.directory / data.users
    if user is not None:
        found = pq.read_table(folder, filters=[("user", "=", user)]).to_pandas()
        if found.empty:
            raise ArtifactError(f"{folder} has no user {user!r}: ids are those of the click table")
        return found
    # One file is enough to find users to show, and stays small where the table is large.
    first = pq.read_table(sorted(folder.glob("*.parquet"))[0]).to_pandas()
    histories = [f.name for f in data.features.item_histories[:1]]
    if histories:
        first = first.sort_values(histories[0], key=lambda past: -past.str.len(), kind="stable")
    return first.head(_SHOWN_USERS)
