"""From a registered version back to the tables it learned from, read from the registry alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from recsys.artifacts import ArtifactError, Examples, PreparedData
from serving_export.registry import ModelVersion

#: Artifact of the run, logged when the model was evaluated.
_MANIFEST = "data/manifest.json"


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a version comes from.

    Attributes:
        model: the version.
        run_id: MLflow run that made it.
        tags: of that run; `recsys.*` say what code made it and where.
        data: manifest of what it was trained and tested on.
    """

    model: ModelVersion
    run_id: str
    tags: dict[str, str]
    data: PreparedData

    def lines(self) -> list[str]:
        """Say it to a person, newest first."""
        code = [
            f"recsys {self.tags.get('recsys.version', 'unknown')}",
            f"git {self.tags.get('mlflow.source.git.commit', 'unknown')}",
        ]
        lines = [
            f"model      {self.model.uri}",
            f"run        {self.run_id} in {self.tags.get('recsys.run_dir', 'an unknown folder')}",
            f"code       {', '.join(code)}",
            f"weights    {self.tags.get('recsys.started_from', 'unknown')}",
            f"schema     {self.data.fingerprint}",
        ]
        for name in ("train", "validation", "test"):
            lines.append(f"{name:10} {_period(getattr(self.data, name))}")
        for name, source in self.data.sources.items():
            version = f", version {source.version}" if source.version else ""
            lines.append(f"table      {name}: {source.uri}, {source.num_rows} rows{version}")
        return lines


def lineage(model: ModelVersion) -> Lineage:
    """Find what a version was made from.

    Raises:
        ArtifactError: the version has no run, or the run lacks the manifest of its data.
    """
    client = MlflowClient()
    run_id = client.get_model_version(model.name, model.version).run_id
    if not run_id:
        raise ArtifactError(f"{model.uri} was registered without a run: its data are unknown")
    try:
        text = mlflow.artifacts.load_text(f"runs:/{run_id}/{_MANIFEST}")
        data = PreparedData.model_validate_json(text)
    except (MlflowException, OSError, ValidationError) as error:
        raise ArtifactError(
            f"the run {run_id} of {model.uri} holds no {_MANIFEST} that can be read: {error}"
        ) from error
    return Lineage(model, run_id, dict(client.get_run(run_id).data.tags), data)


def _period(examples: Examples) -> str:
    return (
        f"{examples.num_examples} labels, {_time(examples.first_at)} to {_time(examples.last_at)}"
    )


def _time(at: datetime | None) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S") if at else "unknown"
