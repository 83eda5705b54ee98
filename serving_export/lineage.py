"""From a registered version back to the tables it learned from, read from the registry alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict, ValidationError

from recsys.artifacts import (
    CORPUS_MANIFEST,
    ArtifactError,
    Examples,
    ExportedModel,
    PreparedData,
)
from recsys.config import Export
from serving_export.registry import ModelVersion, describe

#: Tags of a run that say what code made it, where and from what.
_ORIGIN = ("recsys.", "mlflow.source.git.")


class Provenance(BaseModel):
    """What an export was made from; a later export of the same run has one of its own.

    Attributes:
        tags: of the MLflow run when it was registered; `recsys.*` say what code made it and where.
        data: manifest of what it was trained and tested on.
        corpus: manifest that its items are from, where that is another.
        corpus_folder: of that manifest.
        settings: section `export` of the config.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tags: dict[str, str]
    data: PreparedData
    corpus: PreparedData | None = None
    corpus_folder: str = ""
    settings: Export


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a version comes from: the version, the MLflow run that made it, and the rest."""

    model: ModelVersion
    run_id: str
    provenance: Provenance

    def lines(self) -> list[str]:
        """Say it to a person, newest first."""
        tags, data, corpus = self.provenance.tags, self.provenance.data, self.provenance.corpus
        code = [
            f"recsys {tags.get('recsys.version', 'unknown')}",
            f"git {tags.get('mlflow.source.git.commit', 'unknown')}",
        ]
        lines = [
            f"model      {self.model.uri}",
            f"run        {self.run_id} in {tags.get('recsys.run_dir', 'an unknown folder')}",
            f"code       {', '.join(code)}",
            f"weights    {tags.get('recsys.started_from', 'unknown')}",
            f"schema     {data.fingerprint}",
        ]
        for name in ("train", "validation", "test"):
            lines.append(f"{name:10} {_period(getattr(data, name))}")
        lines += _tables("table", data)
        if corpus is not None:
            lines.append(f"items      {corpus.corpus.num_items} of {self.provenance.corpus_folder}")
            lines += _tables("items from", corpus)
        return lines


def remember(run_id: str, exported: ExportedModel, data: PreparedData, settings: Export) -> None:
    """Log to its run what an export was made from, by its digest."""
    client = MlflowClient()
    tags = {k: v for k, v in client.get_run(run_id).data.tags.items() if k.startswith(_ORIGIN)}
    provenance = Provenance(tags=tags, data=data, settings=settings)
    # As it was exported: the folder that it is from may hold other data by now, or be gone.
    corpus = PreparedData.model_validate_json((exported.directory / CORPUS_MANIFEST).read_bytes())
    if corpus.model_dump() != data.model_dump():
        other = {"corpus": corpus, "corpus_folder": str(Path(exported.corpus).parent)}
        provenance = provenance.model_copy(update=other)
    client.log_text(run_id, provenance.model_dump_json(indent=2), _file(exported.digest))


def lineage(model: ModelVersion) -> Lineage:
    """Find what a version was made from.

    Raises:
        ArtifactError: the version has no run, or the run does not say.
    """
    told = describe(model)
    run_id, file = told["run_id"], _file(told["digest"])
    if not run_id:
        raise ArtifactError(f"{model.uri} was registered without a run: its data are unknown")
    try:
        text = mlflow.artifacts.load_text(f"runs:/{run_id}/{file}")
        provenance = Provenance.model_validate_json(text)
    except (MlflowException, OSError, ValidationError) as error:
        raise ArtifactError(
            f"the run {run_id} of {model.uri} holds no {file} that can be read; where an earlier "
            f"version of this package has registered it, `recsys register` in its run folder logs "
            f"it: {error}"
        ) from error
    return Lineage(model, run_id, provenance)


def _file(digest: str) -> str:
    return f"lineage/{digest}.json"


def _tables(what: str, data: PreparedData) -> list[str]:
    return [
        f"{what:10} {name}: {source.uri}, {source.num_rows} rows"
        + (f", version {source.version}" if source.version else "")
        for name, source in data.sources.items()
    ]


def _period(examples: Examples) -> str:
    return (
        f"{examples.num_examples} labels, {_time(examples.first_at)} to {_time(examples.last_at)}"
    )


def _time(at: datetime | None) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S") if at else "unknown"
