"""The one YAML of a run, as frozen types: unknown keys refused, every error names its key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, ValidationError, model_validator
from yaml import YAMLError

from recsys.model_config import Train, TwoTowerConfig
from recsys.ranking_config import Ranking
from recsys.schema import Feature, Schema
from recsys.search_space import Tune
from recsys.section import Section
from recsys.split_config import Split

Baseline = Literal["popularity", "last_viewed", "markov", "covisitation", "vsknn", "als"]


class ConfigError(ValueError):
    """The config cannot be used; the message names key, expectation and nearest valid name."""


class Source(Section):
    """A table: files at `path`, a catalogue `table`, or a Spark SQL `query`."""

    path: str | None = Field(None, description="file, folder or glob; relative to the YAML file")
    table: str | None = Field(None, description="table of the Spark catalogue")
    query: str | None = Field(None, description="Spark SQL; {path} stands for `path`")
    format: Literal["csv", "json", "parquet", "delta", "text"] = "parquet"
    options: dict[str, str] = Field({}, description="options of Spark's reader")
    derive: dict[str, str] = Field({}, description="new column: Spark SQL expression")

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if self.query is None and (self.path is None) == (self.table is None):
            raise ValueError("give exactly one of `path`, `table` or `query`")
        return self


class EventColumns(Section):
    """Which column of the click table plays which role."""

    user: str
    item: str
    time: str | None = None
    order: tuple[str, ...] = Field((), description="columns that order events of equal time")
    event: str | None = Field(None, description="event type; keys of `event_types`")
    session: str | None = Field(None, description="session id; else made by `session_gap_minutes`")


class Events(Source):
    """The click table."""

    columns: EventColumns
    time_format: str = Field(
        "iso", description="iso, epoch_seconds, epoch_milliseconds, or a Spark datetime pattern"
    )


class Items(Source):
    """The item table: features of candidates, and their readable names."""

    key: str


class Users(Source):
    """The user table: static query features."""

    key: str


class HeldOutColumns(Section):
    """Who took what; when is optional: then it is proved that it comes after the events."""

    user: str
    item: str
    time: str | None = None


class HeldOut(Source):
    """What is held back of the events: all items of a user are the labels of one test query."""

    columns: HeldOutColumns
    time_format: str = Field("iso", description="as in `events`")


class EventType(Section):
    """What an event of this type counts, and whether it is something to predict."""

    weight: float = Field(1.0, gt=0)
    label: bool = True


class Cleaning(Section):
    """Which events are no clicks of a person."""

    drop: dict[str, str] = Field({}, description="reason: Spark SQL predicate of rows to drop")
    deduplicate: bool = True
    not_before: datetime | None = None
    not_after: datetime | None = None
    max_events_per_day: int | None = Field(
        None, ge=1, description="users above it on any day count as bots and are dropped"
    )
    min_user_events: int = Field(1, ge=1, description="training events a training user needs")
    min_item_events: int = Field(1, ge=1, description="training events a warm item needs")


class Data(Section):
    """From the click table to examples."""

    events: Events
    items: Items | None = None
    users: Users | None = None
    held_out: HeldOut | None = Field(None, description="with split.kind=held_out: what tests")
    item_name: str | None = Field(None, description="column with the item's readable name")
    event_types: dict[str, EventType] = Field({}, description="empty: every event is a label")
    cleaning: Cleaning = Cleaning()
    session_gap_minutes: float = Field(30, gt=0)
    split: Split
    history_scope: Literal["user", "session"] = "user"
    min_history: int = Field(0, ge=0, description="earlier events that a label must have")
    exclude_seen: bool = Field(
        False, description="never recommend what the user has seen; evaluated and served alike"
    )
    shards: int = Field(4, ge=1, description="TFRecord files per split")

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if self.event_types and self.events.columns.event is None:
            raise ValueError("`event_types` needs `events.columns.event`")
        if self.event_types and not any(kind.label for kind in self.event_types.values()):
            raise ValueError("at least one of `event_types` must be a label")
        if self.split.by_time and self.events.columns.time is None:
            raise ValueError("a time split needs `events.columns.time`")
        if (self.split.kind == "held_out") != (self.held_out is not None):
            raise ValueError("`held_out`, the table that tests, goes with `split.kind=held_out`")
        if self.held_out is not None and self.history_scope != "user":
            raise ValueError("`held_out` needs `history_scope=user`: its queries are the users'")
        if self.held_out and self.held_out.columns.time and self.events.columns.time is None:
            raise ValueError("`held_out.columns.time` needs `events.columns.time` to come after")
        if self.events.columns.time is None and not self.events.columns.order:
            raise ValueError("`events.columns` needs `time` or `order`: events must have an order")
        return self


class Evaluation(Section):
    """Which metrics, beside which baselines."""

    k: tuple[Annotated[int, Field(ge=1)], ...] = (10, 20, 100)
    baselines: tuple[Baseline, ...] = ("popularity", "last_viewed", "markov", "covisitation", "als")
    bootstrap_samples: int = Field(1000, ge=10)
    confidence: float = Field(0.95, gt=0.5, lt=1)


class Index(Section):
    """Approximate index: tuned until recall against exact search holds."""

    min_recall: float = Field(0.95, gt=0, le=1)
    k: int = Field(100, ge=1, description="neighbours the recall is measured at")


class Export(Section):
    """What serving receives."""

    index: Index = Index()
    parity_queries: int = Field(256, ge=1, description="queries compared in a fresh process")


class Gate(Section):
    """What a model must show before it becomes the champion."""

    metric: str = Field("ndcg@20", pattern=r"^(recall|ndcg|mrr|hit_rate)@[1-9][0-9]*$")
    min_lift_over_baselines: float = Field(0.0, description="relative, over each counting baseline")
    min_lift_over_champion: float = Field(0.0, description="relative, on the same window")


class Registry(Section):
    """Where the model is kept and when it is promoted."""

    model: str
    gate: Gate = Gate()


class Scoring(Section):
    """Batch scoring of all users."""

    k: int = Field(20, ge=1)
    table: str | None = Field(None, description="catalogue table; files in the run folder if empty")


class Cluster(Section):
    """The only section that differs between a laptop and a cluster."""

    kind: Literal["local", "mirrored", "spark"] = Field(
        "local", description="of training: this process, all its GPUs, or workers on Spark"
    )
    workers: int = Field(2, ge=1, description="of kind spark: a task each; they share a batch")
    min_workers: int | None = Field(
        None, ge=1, description="go on with so few if the cluster has shrunk; all if empty"
    )
    max_restarts: int = Field(10, ge=0, description="after lost workers, per fit")
    restart_seconds: float = Field(5, ge=0, description="wait before a restart, doubled each time")
    heartbeat_timeout_seconds: float = Field(
        60, ge=5, description="without a sign of life a worker counts as frozen"
    )
    master: str | None = Field("local[*]", description="Spark master; empty inside a Spark cluster")
    spark: dict[str, str] = Field({}, description="further Spark settings")
    tracking_uri: str | None = Field(None, description="MLflow; SQLite beside the runs if empty")
    experiment: str = "clickstream-recommender"

    @model_validator(mode="after")
    def _fewer(self) -> Cluster:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} exceeds workers={self.workers}")
        return self


class RunConfig(Section):
    """Everything that decides a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(42, ge=0, lt=2**32)
    data: Data
    features: tuple[Feature, ...]
    model: TwoTowerConfig = TwoTowerConfig()
    train: Train = Train()
    ranking: Ranking | None = Field(None, description="without it retrieval alone recommends")
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    registry: Registry
    scoring: Scoring = Scoring()
    cluster: Cluster = Cluster()
    tune: Tune = Tune()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        schema = self.schema_
        if not any(f.kind == "id" and f.source_column == "item" for f in schema.candidate):
            raise ValueError(
                "`features` needs the item's id: {side: candidate, kind: id, column: item}"
            )
        ids = [*schema.candidate, *(schema[h.of or ""] for h in schema.item_histories)]
        sized = [f.name for f in ids if f.source_column == "item" and f.dim]
        if sized:
            raise ValueError(f"feature {sized[0]!r} takes model.embedding_dim: remove its `dim`")
        contexts = [f for f in schema.query if f.side == "context"]
        telling = [f.name for f in contexts if f.source_column in ("item", "event")]
        if telling:
            raise ValueError(
                f"feature {telling[0]!r} tells the label: {contexts[0].side} features are those of "
                "the click to predict; side: query reads item or event of the click before it"
            )
        if self.model.loss.recency_half_life_days and self.data.events.columns.time is None:
            raise ValueError("model.loss.recency_half_life_days needs data.events.columns.time")
        k = int(self.registry.gate.metric.split("@")[1])
        if k not in self.evaluation.k:
            raise ValueError(f"registry.gate.metric needs {k} in evaluation.k={self.evaluation.k}")
        self._check_ranking()
        return self

    def _check_ranking(self) -> None:
        """An answer of two stages has no more items than are ranked."""
        if self.ranking is None:
            return
        longest = {"evaluation.k": max(self.evaluation.k), "scoring.k": self.scoring.k}
        for key, k in longest.items():
            if k > self.ranking.candidates:
                raise ValueError(f"{key}={k} exceeds ranking.candidates={self.ranking.candidates}")

    @property
    def schema_(self) -> Schema:
        """The features as a schema."""
        return Schema(features=self.features)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `a.b=c` overrides, validate.

    Paths of sources and encoders are made absolute: relative to the file in the file, to the
    working directory in overrides.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, a value does not fit.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"config {file} does not exist; ready configs: `recsys configs`")
    try:
        tree = _absolute(OmegaConf.to_container(OmegaConf.load(file), resolve=True), file.parent)
        changes = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=True)
        merged = OmegaConf.merge(tree, _absolute(changes, Path.cwd()))
        values = OmegaConf.to_container(merged)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"config {file} is not readable: {error}") from error
    except TypeError as error:
        raise ConfigError(
            f"overrides {list(overrides)} do not fit {file}: {error}; a list is set as a whole, "
            "such as evaluation.k=[10,20]"
        ) from error
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"config {file}:\n" + "\n".join(explain(error))) from error


def _absolute(tree: Any, base: Path) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ConfigError(f"expected a mapping of keys, got {tree!r}")
    for section, key in _path_keys(tree):
        path = section.get(key)
        if isinstance(path, str) and not is_uri(path):
            section[key] = str((base / path).resolve())
    return tree


def _path_keys(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the sections that may hold a path, and its key."""
    data, features = tree.get("data"), tree.get("features")
    for source in data.values() if isinstance(data, dict) else ():
        if isinstance(source, dict):
            yield source, "path"
    for feature in features if isinstance(features, list) else ():
        if isinstance(feature, dict):
            yield feature, "encoder"


def is_uri(path: str) -> bool:
    """Whether a path has a scheme, such as s3://bucket/x or dbfs:/x, and is left to Spark."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path) is not None


def explain(error: ValidationError) -> Iterator[str]:
    """One line for each problem: key, expectation, what came or the nearest valid name."""
    for problem in error.errors():
        loc = problem["loc"]
        key = ".".join(str(part) for part in loc) or "config"
        if problem["type"] == "extra_forbidden":
            yield f"  {key}: unknown key; {_nearest(str(loc[-1]), _valid_keys(loc[:-1]))}"
        elif problem["type"] == "missing":
            yield f"  {key}: missing; it is required"
        else:
            yield f"  {key}: {problem['msg']}; got {_shorten(problem['input'])}"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid keys are {', '.join(valid)}"


def _valid_keys(loc: Sequence[int | str]) -> list[str]:
    models: list[type[BaseModel]] = [RunConfig]
    for part in loc:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if fields:
            models = [m for field in fields for m in _models_in(field.annotation)]
        elif isinstance(part, str):
            # A discriminated union puts the chosen `kind` into the path.
            models = [m for m in models if _kind_of(m) == part] or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _kind_of(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return kind.annotation.__args__[0] if kind is not None and kind.annotation else None
