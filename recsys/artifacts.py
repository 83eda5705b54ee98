"""What each step hands to the next: JSON manifests, written last and atomically.

Paths inside a manifest are relative to its folder, so a run folder can be moved or copied.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recsys.atomic import write_atomically
from recsys.model_config import TwoTowerConfig
from recsys.schema import Schema

MANIFEST = "manifest.json"
CORPUS_MANIFEST = "corpus.json"
#: Name of the first stage alone among the baselines of an evaluation of two.
RETRIEVAL = "retrieval"


class ArtifactError(RuntimeError):
    """An upstream artifact is missing, unfinished or does not fit; the message says what to do."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Manifest(_Frozen):
    """A finished step. `directory` is where it was read from; it is not stored."""

    step: ClassVar[str]

    version: Literal[1] = 1
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    directory: Path = Field(default=Path(), exclude=True)

    def save(self) -> Self:
        """Write `directory/manifest.json`; a reader sees all of it or nothing."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self.directory / MANIFEST, self.model_dump_json(indent=2))
        return self

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the manifest of a finished step.

        Raises:
            ArtifactError: the step has not finished, or its manifest is of another format.
        """
        file = directory / MANIFEST
        if not file.is_file():
            raise ArtifactError(f"{file} does not exist: run `recsys {cls.step}` first")
        try:
            manifest = cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            raise ArtifactError(f"{file} is not a manifest of `{cls.step}`: {error}") from error
        return manifest.model_copy(update={"directory": directory})

    @classmethod
    def exists(cls, directory: Path) -> bool:
        """Whether the step has finished in this folder."""
        return (directory / MANIFEST).is_file()


class Examples(_Frozen):
    """One split: TFRecord shards of examples."""

    path: str
    num_examples: int
    num_files: int
    first_at: datetime | None = Field(None, description="time of the first label")
    last_at: datetime | None = Field(None, description="time of the last label")
    num_cold_users: int = Field(0, description="users without a training event")
    num_cold_items: int = Field(0, description="labelled items without a training event")


class Sequences(Examples):
    """One split as TFRecord shards of sequences: the labels of a user lie along one history.

    A record lists up to `history` length events, and for every label how many of these events are
    known before it. `num_examples` counts the labels.
    """

    num_sequences: int
    sequences_by_file: tuple[int, ...] = Field(
        (), description="in the order of the files; empty in manifests of earlier versions"
    )


class Queries(Examples):
    """One split with several labels an example: the held-out items of a user. No item comes twice.

    `num_examples` counts the queries; without time stamps there is no first and last label.
    """

    num_labels: int


class Corpus(_Frozen):
    """All candidates: TFRecord shards of item, name, count, labels and the candidate features.

    `count` is the number of training events, `labels` that of training examples of the item. Rows
    are ordered by falling count, then by id; the first `num_warm` have a count.
    """

    path: str
    num_items: int
    num_warm: int


class Impressions(_Frozen):
    """Shown lists: records of queries, whose labels were clicked, with `shown_items` beside.

    `counts` has for each item how often it was `shown` and `clicked` in training and validation.
    """

    validation: Queries
    test: Queries
    counts: str = Field(description="shards")
    longest: int = Field(description="items of a list")
    positions: bool = Field(description="whether `shown_positions` stand beside the items")
    values: tuple[str, ...] = Field((), description="features whose `as_shown` stands there too")


class VocabularyFile(_Frozen):
    """One value a line, most frequent first; none is empty or holds a line break."""

    path: str
    size: int
    oov: int


class Statistics(_Frozen):
    """Mean and standard deviation of a number over the training examples or items."""

    mean: float
    std: float


class SourceVersion(_Frozen):
    """What a table looked like when it was read."""

    uri: str
    num_rows: int
    version: str = Field("", description="Delta version, or a hash of file names and sizes")


class PreparedData(Manifest):
    """Made by `prepare`: everything that training, evaluation and export read."""

    step: ClassVar[str] = "prepare"

    features: Schema
    fingerprint: str = Field(description="of the schema")
    train: Sequences
    recent: Sequences = Field(description="the labels of `validation`, to be learned in the end")
    validation: Examples
    test: Queries | Examples
    corpus: Corpus
    users: str = Field(description="Parquet: the query features of every user as of the last event")
    num_users: int
    vocabularies: dict[str, VocabularyFile] = Field(description="by feature name")
    statistics: dict[str, Statistics] = Field(description="by feature name")
    cleaning: dict[str, int] = Field(description="events read, dropped (by reason), kept")
    sources: dict[str, SourceVersion]
    exclude_seen: bool
    outcomes: bool = Field(False, description="what users did next, by event type, is recorded")
    impressions: Impressions | None = Field(None, description="where the log has what was shown")
    judged: dict[str, dict[str, int]] = Field({}, description="events by split and type, see joint")
    judged_until: datetime | None = Field(None, description="time of the last one of training")

    def files(self, examples: Examples | Corpus) -> list[str]:
        """Shards of a split or of the corpus, in order."""
        found = sorted(str(p) for p in (self.directory / examples.path).glob("part-*"))
        if not found:
            raise ArtifactError(
                f"{self.directory / examples.path} holds no shards: run `recsys prepare` again"
            )
        return found


class TrainedModel(Manifest):
    """Made by `fit`: the towers as a SavedModel with `embed_query` and `embed_candidate`."""

    step: ClassVar[str] = "fit"

    towers: str
    features: Schema
    embedding_dim: int
    best_epoch: int = Field(description="counted from 1")
    monitor: str
    curves: dict[str, list[float]] = Field(description="metric: one value per epoch")
    mlflow_run_id: str | None
    versions: dict[str, str]
    before_refit: str | None = Field(
        None, description="towers that have not learned the validation labels, where others have"
    )
    model: TwoTowerConfig | None = Field(None, description="settings of the towers")
    started_from: str | None = Field(None, description="the model whose weights it began with")
    learned_until: datetime | None = Field(
        None, description="time of the last label learned, but for the refit"
    )


def check_same_schema(model: TrainedModel | TrainedRanker, data: PreparedData) -> None:
    """Refuse a model that was trained on other features than the data have.

    Raises:
        ArtifactError: naming what differs.
    """
    differences = model.features.differences(data.features)
    if differences or model.features.fingerprint != data.fingerprint:
        raise ArtifactError(
            f"{model.directory} is a SavedModel of another schema than {data.directory}: in the "
            f"data {'; '.join(differences) or 'the fingerprint differs'}. "
            f"Run `recsys {model.step}` again"
        )


def with_corpus_of(data: PreparedData, later: PreparedData) -> PreparedData:
    """The data of a model, with the candidates and test queries of a later `prepare`.

    Vocabularies stay those that the model has learned.

    Raises:
        ArtifactError: the later data have other features; naming what differs.
    """
    if data.fingerprint != later.fingerprint:
        differences = "; ".join(data.features.differences(later.features))
        raise ArtifactError(
            f"{later.directory} holds another schema than {data.directory}: "
            f"{differences or 'the fingerprint differs'}. Prepare it with the config of the model"
        )
    moved = {
        name: part.model_copy(update={"path": str((later.directory / part.path).resolve())})
        for name, part in (("corpus", later.corpus), ("test", later.test))
    }
    return data.model_copy(update=moved)


class Estimate(_Frozen):
    """A mean over queries and its bootstrap interval over users."""

    value: float
    low: float
    high: float


class TrainedRanker(Manifest):
    """Made by `rank`: the second stage as a SavedModel with the signature `rank`.

    `lists` holds what it was trained on and calibrated with, a record per request.
    """

    step: ClassVar[str] = "rank"

    ranker: str
    lists: dict[str, int] = Field(description="folder: requests in it")
    with_label: dict[str, int] = Field(description="folder: requests whose label is in the list")
    candidates: int
    features: Schema
    best_epoch: int = Field(description="counted from 1")
    curves: dict[str, list[float]] = Field(description="metric: one value per epoch")
    held_out: dict[str, dict[str, float]] = Field(
        description="metrics on what was held out, by scorer: ranker, uncalibrated, retrieval"
    )
    tasks: dict[str, dict[str, float]] = Field(
        {}, description="with several tasks: metrics on what was held out, by event type"
    )
    versions: dict[str, str]


class EvaluationReport(Manifest):
    """Made by `evaluate`: metrics on the test window beside the baselines."""

    step: ClassVar[str] = "evaluate"

    num_queries: int
    num_candidates: int
    window: tuple[datetime | None, datetime | None]
    data_fingerprint: str
    model: dict[str, Estimate] = Field(description="by metric, such as recall@10")
    baselines: dict[str, dict[str, Estimate]] = Field(description="by baseline and metric")
    lifts: dict[str, dict[str, Estimate]] = Field(
        description="relative lift of the model, by baseline and metric, paired bootstrap"
    )
    slices: dict[str, dict[str, dict[str, float]]] = Field(
        description="by slice, bucket and metric; `queries` counts"
    )
    per_query: str = Field(
        description="npz: user of each query, label and rank by scorer; with several labels a "
        "query, `splits` says which are whose"
    )
    impressions: dict[str, dict[str, float]] = Field(
        {},
        description="with two stages: AUC, AUC within requests and users, log loss, calibration "
        "error and more of the ranked candidates, by scorer",
    )
    tasks: dict[str, dict[str, float]] = Field(
        {}, description="with several tasks: the same metrics of each by its own, by event type"
    )
    shown: dict[str, dict[str, float]] = Field({}, description="the same of shown lists, by scorer")


class IndexPoint(_Frozen):
    """One setting of an index, measured on queries that did not choose it."""

    kind: str = Field(description="brute_force, hashed or tree")
    parameters: dict[str, float]
    recall: float = Field(description="share of the exact top k that is found")
    bytes: int
    milliseconds_per_query: float = Field(description="of one processor, in batches of 100")

    def __str__(self) -> str:
        settings = "".join(f", {name}={value:g}" for name, value in self.parameters.items())
        return (
            f"{self.kind}{settings}: recall {self.recall:.4f}, {self.bytes / 2**20:.1f} MiB, "
            f"{self.milliseconds_per_query:.4f} ms a query"
        )


class IndexReport(IndexPoint):
    """How the approximate index compares with exact search, and with other settings."""

    k: int
    num_queries: int = Field(0, description="that recall and time were measured on")
    seconds: float = Field(0, description="wall time of the search for these settings")
    curve: tuple[IndexPoint, ...] = Field((), description="what was tried, fastest first")


class ExportedModel(Manifest):
    """Made by `export`: two SavedModels with one signature."""

    step: ClassVar[str] = "export"

    variants: dict[str, str] = Field(description="scann and exact: folder")
    features: Schema
    fingerprint: str = Field(description="of the schema")
    num_candidates: int
    corpus: str = Field("", description="shards of the candidates")
    exclude_seen: bool
    filters: tuple[str, ...] = Field((), description="candidate features that requests filter by")
    explores: bool = Field(False, description="whether answers have propensities")
    index: IndexReport
    parity: dict[str, float] = Field(description="share of equal ids, by variant")
    digest: str = Field(description="hash of towers and ranker, and of what else it was made from")
    versions: dict[str, str]


class RegisteredModel(Manifest):
    """Made by `register`: a version in the MLflow registry."""

    step: ClassVar[str] = "register"

    name: str
    model_version: str
    uri: str
    run_id: str


class Check(_Frozen):
    """One comparison of the gate: the value found, its interval if it has one, what is asked."""

    what: str
    value: float
    low: float | None = None
    high: float | None = None
    limit: float
    holds: bool


class Promotion(Manifest):
    """Made by `promote`: the decision, whichever it was, with its reasons."""

    step: ClassVar[str] = "promote"

    name: str
    alias: str
    promoted: bool
    previous_version: str | None
    model_version: str
    reasons: list[str]
    checks: list[Check] = Field([], description="the numbers behind the reasons")


class Scoring(Manifest):
    """Made by `score`: a table of users and their recommendations."""

    step: ClassVar[str] = "score"

    destination: str
    num_users: int
    num_kept: int = Field(0, description="users who keep the answer of the last scoring")
    k: int
    name: str
    model_version: str
