"""The MLflow run of a run folder: one per folder, found again after a restart."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.time import get_current_time_millis

from recsys.config import Cluster, RunConfig

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
        """Log metrics at a step; MLflow forbids `@` in names, so `ndcg@10` becomes `ndcg_at_10`."""
        now = get_current_time_millis()
        entries = [
            Metric(name.replace("@", "_at_"), float(value), now, step)
            for name, value in metrics.items()
        ]
        self._client.log_batch(self.run_id, metrics=entries)

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
            # MLflow allows neither parentheses nor quotes in keys; drop reasons may hold any.
            safe = "".join(c if c.isalnum() or c in "_-. /" else "_" for c in f"{prefix}{key}")
            yield safe, str(value)
