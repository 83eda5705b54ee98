"""The MLflow run of a run folder: one per folder, found again after a restart."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.time import get_current_time_millis

from recsys.artifacts import EvaluationReport, TrainedRanker
from recsys.config import Cluster, RunConfig

logger = logging.getLogger(__name__)

_TOKEN_TAG = "recsys.run"
_FOLDER_TAG = "recsys.run_dir"
_APPLICATION_TAG = "recsys.spark_application"
_PARAM_LIMIT = 6000
_BATCH = 100


class TrackingError(RuntimeError):
    """The tracking server cannot be used; the message says which and what to do."""


def tracking_uri(cluster: Cluster, run_dir: Path) -> str:
    """URI of the tracking store: the configured one, else SQLite beside the run folders."""
    if cluster.tracking_uri:
        return cluster.tracking_uri
    return f"sqlite:///{(run_dir.resolve().parent / 'mlflow.db')}"


def check_reachable(uri: str, timeout: float = 3.0) -> None:
    """Fail within seconds when a tracking server does not answer; MLflow would retry for minutes.

    Raises:
        TrackingError: nothing listens at the host and port of an http(s) URI.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout).close()
    except OSError as error:
        raise TrackingError(
            f"cluster.tracking_uri={uri}: no MLflow server answers ({error}); start it, or leave "
            "the key empty to track in SQLite beside the run folder"
        ) from error


class Tracker:
    """Write to one MLflow run, by id: no global state, so any process may hold one."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri = uri
        self.run_id = run_id
        self._client = MlflowClient(uri)
        self._logged: dict[str, set[int]] = {}

    def __reduce__(self) -> tuple[type[Tracker], tuple[str, str]]:
        """Pickle as its address: the chief of a cluster opens its own connection."""
        return Tracker, (self.uri, self.run_id)

    @classmethod
    def open(cls, config: RunConfig, run_dir: Path, token: str) -> Tracker:
        """Find the run of this folder, or create it.

        A run that had failed is continued. It is found by a tag, so also by the successor of a
        process that was killed before it could note the run's id.

        Args:
            config: of the run.
            run_dir: its folder.
            token: see `RunFolder.token`.

        Raises:
            TrackingError: the store cannot be reached or read.
        """
        uri = tracking_uri(config.cluster, run_dir)
        check_reachable(uri)
        # The store creates its tables through alembic, which announces each of them.
        os.environ.setdefault("MLFLOW_ALEMBIC_LOG_LEVEL", "WARNING")
        try:
            run = _find_or_create(MlflowClient(uri), config, run_dir, token)
        except Exception as error:
            # Each kind of store fails in its own way: SQL, HTTP, files, MLflow's own errors.
            raise TrackingError(f"MLflow at {uri} cannot be used: {error}") from error
        tracker = cls(uri, run.info.run_id)
        tracker.set_status("RUNNING")
        return tracker

    def child(self, name: str, token: str) -> Tracker:
        """Open a run nested in this one; like this one, it is found again by its token."""
        experiment_id = self._client.get_run(self.run_id).info.experiment_id
        tags = {_TOKEN_TAG: token, MLFLOW_PARENT_RUN_ID: self.run_id}
        run = _find_run(self._client, experiment_id, token) or self._client.create_run(
            experiment_id, tags=tags, run_name=name
        )
        child = Tracker(self.uri, run.info.run_id)
        child.set_status("RUNNING")
        return child

    def log_config(self, config: RunConfig) -> None:
        """Log every setting as a parameter, once."""
        self.log_params(dict(_flatten(config.model_dump(mode="json"))))

    def log_params(self, values: Mapping[str, str]) -> None:
        """Log parameters that have not been logged; MLflow refuses to change one."""
        known = self._client.get_run(self.run_id).data.params
        params = [
            Param(key, value[:_PARAM_LIMIT]) for key, value in values.items() if key not in known
        ]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(self.run_id, params=params[start : start + _BATCH])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step."""
        now = get_current_time_millis()
        entries = [Metric(_key(name), float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=entries)

    def log_ranker(self, ranker: TrainedRanker) -> None:
        """Log what a ranker reaches on what it holds out, by its score and by task."""
        parts = {"": ranker.held_out["ranker"]} | _by_task(ranker.tasks)
        self.log_metrics(
            {
                f"ranker/held_out/{part}{metric}": value
                for part, metrics in parts.items()
                for metric, value in metrics.items()
            }
        )

    def log_report(self, report: EvaluationReport) -> None:
        """Log the metrics of an evaluation, those of the baselines and of the ranked lists."""
        self.log_metrics(_test_metrics(report))

    def log_curves(self, curves: Mapping[str, Sequence[float]]) -> None:
        """Log the metrics of all epochs, each under its number, but those that have been logged.

        Args:
            curves: values by metric, of the first epoch first.
        """
        missing: dict[int, dict[str, float]] = {}
        for name, values in curves.items():
            for epoch, value in enumerate(values, 1):
                if epoch not in self._steps(name):
                    missing.setdefault(epoch, {})[name] = value
        for epoch, metrics in sorted(missing.items()):
            self.log_metrics(metrics, epoch)
            for name in metrics:
                self._steps(name).add(epoch)

    def follow_curves(self, curves: Mapping[str, Sequence[float]]) -> None:
        """As `log_curves`, but while MLflow cannot be used leave the epochs to the next call."""
        try:
            check_reachable(self.uri)
            self.log_curves(curves)
        except Exception as error:
            # A training is worth more than its log.
            told = str(error).split("\n", 1)[0]
            logger.warning("metrics are kept until MLflow can be used again: %s", told)

    @contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Log what the block takes of this machine as `system/...`: CPU, memory, network, GPU.

        Steps go on where a process before this one has stopped. The thread that logs ends with the
        block, or when MLflow cannot be used.
        """
        try:
            monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
            monitor.start()
        except Exception as error:
            logger.warning("system metrics are not logged: %s", error)
            yield
            return
        try:
            yield
        finally:
            monitor.finish()

    def _steps(self, name: str) -> set[int]:
        """Steps at which a metric has been logged, by this process or by one before it."""
        if name not in self._logged:
            history = self._client.get_metric_history(self.run_id, _key(name))
            self._logged[name] = {metric.step for metric in history}
        return self._logged[name]

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; those of an earlier attempt are replaced."""
        for key, value in tags.items():
            self._client.set_tag(self.run_id, key, value)

    def log_application(self, application_id: str) -> None:
        """Note the Spark application that trains; a resumed run has that of its last attempt."""
        self._client.set_tag(self.run_id, _APPLICATION_TAG, application_id)

    def log_artifact(self, file: Path, folder: str = "") -> None:
        """Upload one file."""
        self._client.log_artifact(self.run_id, str(file), folder or None)

    def log_folder(self, folder: Path, to: str) -> None:
        """Upload what a folder holds."""
        self._client.log_artifacts(self.run_id, str(folder), to)

    def log_text(self, text: str, file: str) -> None:
        """Upload a text as `file`, such as `evaluation/summary.txt`."""
        self._client.log_text(self.run_id, text, file)

    def log_figure(self, figure: Figure, file: str) -> None:
        """Upload a picture as `file`, such as `model/curves.png`."""
        self._client.log_figure(self.run_id, figure, file)

    def set_status(self, status: str) -> None:
        """Set RUNNING, FINISHED, FAILED or KILLED."""
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status)


def _key(metric: str) -> str:
    """Name in MLflow, which forbids `@`: `ndcg@10` becomes `ndcg_at_10`."""
    return metric.replace("@", "_at_")


def _find_or_create(client: MlflowClient, config: RunConfig, run_dir: Path, token: str) -> Run:
    name = config.cluster.experiment
    experiment = client.get_experiment_by_name(name)
    experiment_id = (
        experiment.experiment_id
        if experiment is not None
        else client.create_experiment(name, artifact_location=_artifacts(config.cluster, run_dir))
    )
    found = _find_run(client, experiment_id, token)
    if found is not None:
        return found
    tags = {_TOKEN_TAG: token, _FOLDER_TAG: str(run_dir.resolve())}
    return client.create_run(experiment_id, tags=tags, run_name=config.name)


def _find_run(client: MlflowClient, experiment_id: str, token: str) -> Run | None:
    query = f"tags.`{_TOKEN_TAG}` = '{token}'"
    return next(iter(client.search_runs([experiment_id], query, max_results=1)), None)


def _artifacts(cluster: Cluster, run_dir: Path) -> str | None:
    # SQLite holds no files, and MLflow's default for them is the working directory.
    if cluster.tracking_uri:
        return None
    return (run_dir.resolve().parent / "mlartifacts").as_uri()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif value not in (None, [], {}):
            yield _safe(f"{prefix}{key}"), str(value)


def _safe(key: str) -> str:
    """Replace what MLflow allows in no key: drop reasons and event types may hold anything."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in key)


def _test_metrics(report: EvaluationReport) -> dict[str, float]:
    scorers = {"test": report.model} | {
        f"baseline/{name}": metrics for name, metrics in report.baselines.items()
    }
    estimates = {
        f"{scorer}/{metric}": estimate.value
        for scorer, metrics in scorers.items()
        for metric, estimate in metrics.items()
    }
    ranked = {f"{scorer}/": metrics for scorer, metrics in report.impressions.items()}
    shown = {f"shown/{scorer}/": metrics for scorer, metrics in report.shown.items()}
    return estimates | {
        f"impressions/{part}{metric}": value
        for part, metrics in (ranked | _by_task(report.tasks) | shown).items()
        for metric, value in metrics.items()
    }


def _by_task(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    return {f"task/{_safe(task)}/": metrics for task, metrics in tasks.items()}
