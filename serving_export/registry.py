"""Models in the MLflow registry: register, find again, download, ask.

A version is always addressed by what created it, by its digest, or by an alias; never as "the
newest". Every function can be killed and repeated. Works on the tracking store that `connect` set.
"""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import DataType, ParamSchema, ParamSpec
from mlflow.types.schema import Array, ColSpec
from mlflow.types.schema import Schema as ColumnSchema

from recsys.artifacts import ArtifactError, EvaluationReport, ExportedModel, RegisteredModel
from recsys.atomic import replaced
from recsys.config import RunConfig
from recsys.list_config import PROPENSITIES
from recsys.schema import Feature, Schema, filter_input

logger = logging.getLogger(__name__)

CHAMPION = "champion"
CHALLENGER = "challenger"

_PYFUNC = Path(__file__).with_name("pyfunc.py")
_PINNED = ("mlflow", "numpy", "pandas", "scann", "tensorflow")
_COLUMN_TYPES = {"string": DataType.string, "float": DataType.double, "int64": DataType.long}
#: Error codes of MLflow for what is not there.
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    version: str

    @property
    def uri(self) -> str:
        """Address for MLflow, `models:/name/version`."""
        return f"models:/{self.name}/{self.version}"


class Champion(NamedTuple):
    """The present champion, and a local copy of its exact SavedModel."""

    version: str
    path: Path


def connect(tracking_uri: str) -> None:
    """Let all later calls work on this store; a server that is gone fails in seconds, not minutes.

    MLflow repeats a request 7 times with growing waits; two are enough here, unless
    `MLFLOW_HTTP_REQUEST_MAX_RETRIES` says otherwise.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    mlflow.set_tracking_uri(tracking_uri)


def resolve(reference: str) -> ModelVersion:
    """Find a version: `name`, `name@alias` or `name/version`, `models:/` before it or not.

    A name alone means its champion.

    Raises:
        ArtifactError: there is no such model, alias or version.
    """
    name, _, alias = reference.removeprefix("models:/").partition("@")
    name, _, number = name.partition("/")
    client = MlflowClient()
    try:
        if number:
            found = client.get_model_version(name, number)
        else:
            found = client.get_model_version_by_alias(name, alias or CHAMPION)
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        raise ArtifactError(
            f"the registry at {mlflow.get_registry_uri()} has no {reference!r}: {error.message} "
            f"(a version becomes {CHAMPION} by `recsys promote`, if it passes the gate; "
            f"promotion/manifest.json of a run holds the reasons)"
        ) from error
    return ModelVersion(name, str(found.version))


def describe(model: ModelVersion) -> dict[str, str]:
    """Tell what a version is and what made it: `name`, `version`, `run_id`, `digest`."""
    found = MlflowClient().get_model_version(model.name, model.version)
    return {
        "name": model.name,
        "version": model.version,
        "run_id": found.run_id or "",
        "digest": found.tags.get("digest", ""),
    }


def download(model: ModelVersion, directory: Path, part: str = "") -> Path:
    """Copy a version, or a `part` of it such as `artifacts/exact`, to `directory`; once."""
    if not directory.is_dir():
        with replaced(directory) as folder:
            fetched = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{model.uri}/{part}".rstrip("/"), dst_path=str(folder / "fetched")
            )
            _lift_up(Path(fetched), folder)
    return directory


def download_logged(model: ModelVersion, part: str, directory: Path) -> Path:
    """Copy a file or folder that the run of a version has logged to `directory`.

    Raises:
        ArtifactError: the version has no run, or the run has no such artifact.
    """
    run_id = describe(model)["run_id"]
    try:
        uri = f"runs:/{run_id}/{part}"
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(directory)))
    except (MlflowException, OSError) as error:
        raise ArtifactError(
            f"{model.uri}: its run {run_id or 'is unknown, which'} holds no {part} that can be "
            f"read: {error}"
        ) from error


def register(
    config: RunConfig, exported: ExportedModel, report: EvaluationReport, run_id: str,
    directory: Path,
) -> RegisteredModel:  # fmt: skip
    """Log the export to its run, make it a version of the model, call it challenger.

    Repeated for the same export and run, it finds the version it made.
    """
    name = config.registry.model
    found = _find(name, exported.digest, run_id) or _create(name, exported, report, run_id)
    MlflowClient().set_registered_model_alias(name, CHALLENGER, found.version)
    return RegisteredModel(
        directory=directory,
        name=name,
        model_version=found.version,
        uri=found.uri,
        run_id=run_id,
    ).save()


def recommend(reference: str, queries: pd.DataFrame, k: int) -> pd.DataFrame:
    """Ask a registered model: `ids` and `scores` per row of queries, best first.

    Args:
        reference: see `resolve`.
        queries: query features by name, and maybe `exclusions`; absent columns are unknown.
        k: number of items.
    """
    uri = resolve(reference).uri
    outputs = mlflow.models.get_model_info(uri).signature.outputs
    if PROPENSITIES not in outputs.input_names():
        return _answered(uri, queries, k)
    # A training may have made this process deterministic, in which TensorFlow draws nothing.
    stores = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    with ProcessPoolExecutor(1, get_context("spawn"), _connect_both, stores) as fresh:
        return fresh.submit(_answered, uri, queries, k).result()


def _connect_both(tracking_uri: str, registry_uri: str) -> None:
    connect(tracking_uri)
    mlflow.set_registry_uri(registry_uri)


def _answered(uri: str, queries: pd.DataFrame, k: int) -> pd.DataFrame:
    model = mlflow.pyfunc.load_model(uri).unwrap_python_model()
    answers: pd.DataFrame = model.predict(None, queries, {"k": k})
    return answers


def find_champion(name: str) -> str | None:
    """Version of the champion of a model, None when no version has passed the gate."""
    try:
        return resolve(f"{name}@{CHAMPION}").version
    except ArtifactError:
        return None


def champion(config: RunConfig, directory: Path) -> Champion | None:
    """Find the champion and copy its exact SavedModel below `directory`; None without champion."""
    version = find_champion(config.registry.model)
    if version is None:
        return None
    found = ModelVersion(config.registry.model, version)
    copy = directory / f"{found.name}-{found.version}-exact"
    return Champion(version, download(found, copy, "artifacts/exact"))


def _find(name: str, digest: str, run_id: str) -> ModelVersion | None:
    client = MlflowClient()
    for found in client.search_model_versions(f"name='{name}'"):
        # Unity Catalog leaves tags out of search results.
        if found.run_id == run_id and found.status == "READY":
            tags = client.get_model_version(name, found.version).tags
            if tags.get("digest") == digest:
                return ModelVersion(name, str(found.version))
    return None


def _create(
    name: str, exported: ExportedModel, report: EvaluationReport, run_id: str
) -> ModelVersion:
    tags = {"digest": exported.digest, "schema_fingerprint": exported.fingerprint} | {
        metric.replace("@", "_at_"): f"{estimate.value:.6g}"
        for metric, estimate in report.model.items()
    }
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name="recommender",
            python_model=str(_PYFUNC),
            artifacts={n: str(exported.directory / p) for n, p in exported.variants.items()},
            signature=_signature(exported),
            input_example=(_example(exported.features), {"k": 5}),
            pip_requirements=[f"{name}=={installed_version(name)}" for name in _PINNED],
        )
    # With its tags from the first moment, so that a repeated call cannot miss it.
    # MLflow tells on stderr what `logger` says here.
    with redirect_stderr(StringIO()):
        created = mlflow.register_model(logged.model_uri, name, tags=tags)
    logger.info("registered %s version %s", name, created.version)
    return ModelVersion(name, str(created.version))


def _signature(exported: ExportedModel) -> ModelSignature:
    schema = exported.features
    columns = [ColSpec(_column_type(f), f.name, required=False) for f in schema.query]
    columns.append(ColSpec(Array(DataType.string), "exclusions", required=False))
    for feature in (schema[name] for name in exported.filters):
        asked = Array(_COLUMN_TYPES[feature.dtype])
        columns.append(ColSpec(asked, filter_input(feature.name), required=False))
    numbers = ("scores", PROPENSITIES) if exported.explores else ("scores",)
    outputs = [ColSpec(Array(DataType.string), "ids")]
    outputs += [ColSpec(Array(DataType.double), name) for name in numbers]
    return ModelSignature(
        inputs=ColumnSchema(columns),
        outputs=ColumnSchema(outputs),
        params=ParamSchema([ParamSpec("k", DataType.long, 20)]),
    )


def _column_type(feature: Feature) -> Any:
    column_type = _COLUMN_TYPES[feature.dtype]
    return Array(column_type) if feature.shape else column_type


def _example(schema: Schema) -> pd.DataFrame:
    """A query of which nothing is known."""
    unknown: dict[str, Any] = {"string": "", "float": 0.0, "int64": -1}
    row = {
        f.name: [[unknown[f.dtype]] * (f.shape[0] or 1)] if f.shape else [unknown[f.dtype]]
        for f in schema.query
    }
    return pd.DataFrame(row | {"exclusions": [[""]]})


def _lift_up(inner: Path, folder: Path) -> None:
    for path in inner.iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(folder / "fetched")
