"""The steps of a run in their order: which manifest each reads and which it leaves.

Together with `recsys.cli` this is the composition root: the only place that knows `training` and
`serving_export` at once. Both are imported inside the steps, so a server needs no Spark.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from recsys.artifacts import (
    MANIFEST,
    EvaluationReport,
    ExportedModel,
    Manifest,
    PreparedData,
    Promotion,
    RegisteredModel,
    Scoring,
    TrainedModel,
)
from recsys.config import RunConfig
from recsys.run_folder import RunFolder

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from training.tracking import Tracker

logger = logging.getLogger(__name__)

#: Steps in order, and what each leaves in its folder.
STEPS: dict[str, tuple[str, type[Manifest]]] = {
    "prepare": ("data", PreparedData),
    "fit": ("model", TrainedModel),
    "evaluate": ("evaluation", EvaluationReport),
    "export": ("export", ExportedModel),
    "register": ("registration", RegisteredModel),
    "promote": ("promotion", Promotion),
    "score": ("scoring", Scoring),
}
M = TypeVar("M", bound=Manifest)


class Run:
    """A run folder with its config, and the steps that work on it."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        self.folder = folder
        self.config = config
        self._spark: SparkSession | None = None
        self._tracker: Tracker | None = None

    def preflight(self) -> None:
        """Find within a second what would fail later: columns, Java, tracking server."""
        from training.prepare.columns import check_columns
        from training.session import check_java
        from training.tracking import check_reachable, tracking_uri

        check_columns(self.config)
        check_java()
        check_reachable(tracking_uri(self.config.cluster, self.folder.path))

    def do(self, step: str, again: bool = False) -> None:
        """Do one step, unless it is finished and not wanted `again`.

        A failure marks the MLflow run; the next attempt continues the same run.
        """
        directory = self.directory(step)
        if STEPS[step][1].exists(directory) and not again:
            logger.info("%s: finished before, in %s", step, directory)
            return
        self._invalidate(step)
        started = time.monotonic()
        try:
            getattr(self, f"_{step}")(directory)
        except BaseException:
            if self._tracker is not None:
                self._tracker.set_status("FAILED")
            raise
        logger.info("%s: done in %.0f s", step, time.monotonic() - started)

    def finish(self) -> None:
        """Close the MLflow run as finished, and Spark."""
        self.tracker.set_status("FINISHED")
        if self._spark is not None:
            self._spark.stop()

    def directory(self, step: str) -> Path:
        """Folder of a step."""
        return self.folder.step(STEPS[step][0])

    def load(self, step: str, kind: type[M]) -> M:
        """Manifest of a finished step."""
        return kind.load(self.directory(step))

    @property
    def spark(self) -> SparkSession:
        """The Spark session, started when a step first needs it."""
        from training.session import spark_session

        self._spark = self._spark or spark_session(self.config.cluster, self.config.name)
        return self._spark

    @property
    def tracker(self) -> Tracker:
        """The MLflow run of this folder, opened when a step first needs it."""
        from training.tracking import Tracker

        self._tracker = self._tracker or Tracker.open(self.config, self.folder.path)
        return self._tracker

    def _invalidate(self, step: str) -> None:
        """Remove a finished result that is made again, and what later steps made of it.

        What a killed attempt left stays: each step knows how to go on from there.
        """
        names = list(STEPS)
        if STEPS[step][1].exists(self.directory(step)):
            shutil.rmtree(self.directory(step))
        for later in names[names.index(step) + 1 :]:
            shutil.rmtree(self.directory(later), ignore_errors=True)

    def _prepare(self, directory: Path) -> None:
        from training.prepare import prepare

        prepare(self.config, self.spark, directory)

    def _fit(self, directory: Path) -> None:
        from training.fit import fit

        data = self.load("prepare", PreparedData)
        self.tracker.log_config(self.config)
        fit(self.config, data, directory, self.tracker.run_id, self.tracker.log_metrics)

    def _evaluate(self, directory: Path) -> None:
        from training.evaluate import evaluate

        data, model = self.load("prepare", PreparedData), self.load("fit", TrainedModel)
        spark = self.spark if "als" in self.config.evaluation.baselines else None
        report = evaluate(self.config, data, model, spark, directory)
        self.tracker.log_metrics(_test_metrics(report))
        for name in ("data", "model", "evaluation"):
            self.tracker.log_artifact(self.folder.step(name) / MANIFEST, name)

    def _export(self, directory: Path) -> None:
        from serving_export.savedmodel import export

        data, model = self.load("prepare", PreparedData), self.load("fit", TrainedModel)
        export(self.config, data, model, directory)

    def _register(self, directory: Path) -> None:
        from serving_export.registry import register

        exported = self.load("export", ExportedModel)
        report = self.load("evaluate", EvaluationReport)
        register(self.config, exported, report, self.tracker.run_id, directory)

    def _promote(self, directory: Path) -> None:
        from serving_export.registry import champion, promote
        from training.evaluate import evaluate_savedmodel

        registered = self.load("register", RegisteredModel)
        report = self.load("evaluate", EvaluationReport)
        present = champion(self.config, directory)
        rival = None
        if present is not None and present.version != registered.model_version:
            data = self.load("prepare", PreparedData)
            rival = evaluate_savedmodel(self.config, data, present.path, directory / "champion")
        promote(self.config, registered, report, rival, directory)

    def _score(self, directory: Path) -> None:
        from serving_export.batch import score

        score(self.config, self.spark, self.load("prepare", PreparedData), directory)


def _test_metrics(report: EvaluationReport) -> dict[str, float]:
    scorers = {"test": report.model} | {
        f"baseline/{name}": metrics for name, metrics in report.baselines.items()
    }
    return {
        f"{scorer}/{metric}": estimate.value
        for scorer, metrics in scorers.items()
        for metric, estimate in metrics.items()
    }
