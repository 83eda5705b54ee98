"""The steps of a run in their order: which manifest each reads and which it leaves.

Together with `recsys.registered` and `recsys.cli` this is the composition root: only they know
`training` and `serving_export` at once. Both are imported inside the steps, so a server needs no
Spark.
"""

from __future__ import annotations

import logging
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
    with_corpus_of,
)
from recsys.config import ConfigError, RunConfig
from recsys.overrides import check_space, check_tunable
from recsys.registered import Registered, connect_registry
from recsys.run_folder import RunFolder
from recsys.stale import TUNING, invalidate
from recsys.steps import STEPS, steps_of
from recsys.summary import (
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
from recsys.warm_start import WarmStart, begun_with, keep_for_next

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from training.tracking import Tracker

logger = logging.getLogger(__name__)

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
        WarmStart(self.config, self.folder).check()

    @property
    def steps(self) -> list[str]:
        """The steps of this run in their order."""
        return steps_of(self.config)

    def do(self, step: str, again: bool = False, **arguments: object) -> None:
        """Do one step, unless it is finished and not wanted `again`.

        A failure marks the MLflow run; the next attempt continues the same run.

        Args:
            step: name.
            again: whether to do a finished step anew.
            arguments: that the step takes besides its config and manifests.

        Raises:
            ConfigError: the config does not have this step.
        """
        if step not in self.steps:
            raise ConfigError(f"{step}: the config has no `ranking` section, so nothing is ranked")
        directory = self.directory(step)
        if STEPS[step][1].exists(directory) and not again:
            logger.info("%s: finished before, in %s", step, directory)
            return
        invalidate(self.folder, step)
        started = time.monotonic()
        with self.tracked():
            getattr(self, f"_{step}")(directory, **arguments)
        logger.info("%s: done in %.0f s", step, time.monotonic() - started)

    def reindex(self, later: Path) -> None:
        """Export the trained model again over the corpus of another run, prepared later.

        New items are embedded by the candidate tower that is there; nothing is trained. The recall
        target is measured on the test queries of the other run.

        Raises:
            ArtifactError: `later` is not prepared, or has other features; the export stays.
            ConfigError: there is a ranker, which knows the items that it was trained with alone.
        """
        if self.config.ranking is not None:
            raise ConfigError(
                "export --corpus-of: a ranker knows the items of its training alone, so it cannot "
                "rank a later corpus; train anew, or leave `ranking` out of the config"
            )
        theirs = PreparedData.load(RunFolder(later).step(STEPS["prepare"][0]))
        data = with_corpus_of(self.load("prepare", PreparedData), theirs)
        self.do("export", again=True, data=data)

    def start_with(self, warm_start: str) -> None:
        """Let the fit that comes begin with the weights of another model.

        Raises:
            ArtifactError, ConfigError: see `WarmStart.change`.
        """
        from training.fit import saved

        directory = self.directory("fit")
        begun = bool(saved(directory)) and not TrainedModel.exists(directory)
        self.config = WarmStart(self.config, self.folder).change(warm_start, begun)

    def tune(self, trials: int | None = None) -> str:
        """Prepare if needed, search for better settings, tell the best; change no other step.

        Args:
            trials: how many the study shall have in all; `tune.trials` when not given.

        Raises:
            ArtifactError: Optuna is not installed.
            ConfigError: `tune.space` is empty or does not fit the config.
        """
        try:
            from training.study import STUDY
            from training.tune import tune
        except ModuleNotFoundError as error:
            if error.name != "optuna":
                raise
            raise ArtifactError(
                "`recsys tune` needs Optuna: pip install 'clickstream-recommender[tuning]'"
            ) from error
        check_tunable(self.config)
        self.do("prepare")
        data, directory = self.load("prepare", PreparedData), self.folder.step(TUNING)
        begun = (directory / STUDY).exists()
        start = WarmStart(self.config, self.folder).copy(data, directory, begun)
        with self.tracked():
            config = begun_with(self.config, start)
            report = tune(config, data, directory, self.tracker, trials)
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
    def registered(self) -> Registered:
        """The registered versions of this run's model."""
        return Registered(self.config, self.folder.path, self.directory("prepare"))

    @property
    def tracker(self) -> Tracker:
        """The MLflow run of this folder, opened when a step first needs it."""
        from training.tracking import Tracker

        if self._tracker is None:
            self._tracker = Tracker.open(self.config, self.folder.path, self.folder.token())
        return self._tracker

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Close the MLflow run after a step: each may be the last that this process does."""
        try:
            yield
        except BaseException:
            try:
                self._close_tracker("FAILED")
            except Exception as error:
                # The first error is the one to be seen.
                logger.warning("the MLflow run could not be marked as failed: %s", error)
            raise
        self._close_tracker("FINISHED")

    def _close_tracker(self, status: str) -> None:
        if self._tracker is not None:
            self._tracker.set_status(status)
            self._tracker = None

    def summary(self) -> str:
        """What the run has brought so far, for a person."""
        parts = [self._tables(self.load("evaluate", EvaluationReport))]
        if RegisteredModel.exists(self.directory("register")):
            registered = self.load("register", RegisteredModel)
            lines = export_lines(self.load("export", ExportedModel))
            promotion = self._if_finished("promote", Promotion)
            lines += decision_lines(registered, promotion, self._if_finished("score", Scoring))
            shown = self.registered.ask(
                f"{registered.name}/{registered.model_version}", None, _SHOWN_ITEMS
            )
            parts += ["\n".join(lines), "\n".join(recommendation_lines(shown))]
        return "\n\n".join(parts)

    def _tables(self, report: EvaluationReport) -> str:
        """Metrics, lifts and slices."""
        metric = self.config.registry.gate.metric
        parts = [
            f"{self.config.name}: {report.num_queries} test queries over {report.num_candidates} "
            f"items, seen items {'excluded' if self.config.data.exclude_seen else 'allowed'}",
            metrics_table(report, int(metric.split("@")[1])),
            lifts_table(report, metric),
            slices_table(report.slices, metric),
        ]
        if report.impressions:
            tasks = {f"task {name}": metrics for name, metrics in report.tasks.items()}
            logged = {f"{name}, as shown": metrics for name, metrics in report.shown.items()}
            parts.insert(3, impressions_table(report.impressions | tasks | logged))
        return "\n\n".join(parts)

    def _if_finished(self, step: str, kind: type[M]) -> M | None:
        return self.load(step, kind) if kind.exists(self.directory(step)) else None

    def _prepare(self, directory: Path) -> None:
        from training.prepare import prepare

        prepare(self.config, self.spark, directory)

    def _fit(self, directory: Path) -> None:
        from training.distribute import launch
        from training.fit import fit, saved
        from training.origin import origin

        # Executors have another working directory.
        directory = directory.resolve()
        data = PreparedData.load(self.directory("prepare").resolve())
        warm_start = WarmStart(self.config, self.folder)
        start = warm_start.copy(data, directory, begun=bool(saved(directory)))
        self.tracker.log_config(self.config)
        self.tracker.set_tags(origin(data, Path.cwd(), start))
        if self.config.cluster.kind.startswith("spark"):
            self.tracker.log_application(self.spark.sparkContext.applicationId)
        model = launch(
            fit,
            self.config.cluster,
            begun_with(self.config, start),
            data,
            directory,
            self.tracker.run_id,
            self.tracker.follow_curves,
            self.tracker.system_metrics,
            folder=directory,
            spark=lambda: self.spark,
            saved=lambda: saved(directory),
        )
        # What the chief could not log while MLflow was away.
        self.tracker.log_curves(model.curves)

    def _rank(self, directory: Path) -> None:
        from training.rank import rank

        data, model = self.load("prepare", PreparedData), self.load("fit", TrainedModel)
        ranker = rank(self.config, data, model, directory)
        self.tracker.log_ranker(ranker)

    def _evaluate(self, directory: Path) -> None:
        from training.evaluate import evaluate
        from training.plots import beside_baselines, curves

        data, model = self.load("prepare", PreparedData), self.load("fit", TrainedModel)
        spark = self.spark if "als" in self.config.evaluation.baselines else None
        report = evaluate(self.config, data, model, spark, directory, self._ranker())
        self.tracker.log_report(report)
        folders = ["data", "model", *(["ranking"] if self.config.ranking else []), "evaluation"]
        for name in folders:
            self.tracker.log_artifact(self.folder.step(name) / MANIFEST, name)
        self.tracker.log_text(self._tables(report), "evaluation/summary.txt")
        self.tracker.log_figure(curves(model), "model/curves.png")
        metric = self.config.registry.gate.metric
        self.tracker.log_figure(beside_baselines(report, metric), "evaluation/baselines.png")

    def _export(self, directory: Path, data: PreparedData | None = None) -> None:
        from serving_export.savedmodel import export

        data = data or self.load("prepare", PreparedData)
        export(self.config, data, self.load("fit", TrainedModel), directory, self._ranker())

    def _ranker(self) -> TrainedRanker | None:
        return None if self.config.ranking is None else self.load("rank", TrainedRanker)

    def _register(self, directory: Path) -> None:
        from serving_export.lineage import remember
        from serving_export.registry import register

        connect_registry(self.config, self.folder.path)
        exported = self.load("export", ExportedModel)
        report = self.load("evaluate", EvaluationReport)
        for name in (MANIFEST, "index.txt", "index.png"):
            if (exported.directory / name).is_file():
                self.tracker.log_artifact(exported.directory / name, "export")
        keep_for_next(self.tracker, self.load("fit", TrainedModel), exported)
        data = self.load("prepare", PreparedData)
        remember(self.tracker.run_id, exported, data, self.config.export)
        register(self.config, exported, report, self.tracker.run_id, directory)

    def _promote(self, directory: Path) -> None:
        from serving_export.promotion import Rival, promote, same_model
        from serving_export.registry import champion

        registered = self.load("register", RegisteredModel)
        report = self.load("evaluate", EvaluationReport)
        index = self.load("export", ExportedModel).index
        connect_registry(self.config, self.folder.path)
        present = champion(self.config, directory)
        rival = None
        if present is not None and present.version != registered.model_version:
            same = same_model(registered.name, registered.model_version, present.version)
            theirs = "" if same else self._evaluated(present.path, directory / "champion")
            rival = Rival(present.version, theirs)
        promote(self.config, registered, report, index, rival, directory)

    def _evaluated(self, champion: Path, directory: Path) -> EvaluationReport | str:
        """Evaluation of the champion on the data of this run, or why there is none."""
        from training.evaluate import evaluate_savedmodel

        try:
            data = self.load("prepare", PreparedData)
            return evaluate_savedmodel(self.config, data, champion, directory)
        except ArtifactError as error:
            return str(error)

    def _score(self, directory: Path, last: Scoring | None = None) -> None:
        from serving_export.batch import score
        from serving_export.registry import find_champion

        connect_registry(self.config, self.folder.path)
        if find_champion(self.config.registry.model) is None:
            logger.warning("nothing is scored: no version of the model has passed the gate yet")
            return
        data = self.load("prepare", PreparedData)
        users = str((data.directory / data.users).resolve())
        score(self.config, self.spark, users, directory, last=last)
