"""The one YAML of a run, as frozen types: unknown keys refused, every error names its key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, ValidationError, model_validator
from yaml import YAMLError

from recsys.data_config import Data
from recsys.list_config import Diversity, Exploration
from recsys.model_config import CHAMPION, Train, TwoTowerConfig, check_joint
from recsys.monitoring_config import Monitoring
from recsys.ranking_config import Ranking
from recsys.schema import Feature, Schema
from recsys.search_space import Tune
from recsys.section import Section

Baseline = Literal["popularity", "last_viewed", "markov", "covisitation", "vsknn", "als"]


class ConfigError(ValueError):
    """The config cannot be used; the message names key, expectation and nearest valid name."""


class Evaluation(Section):
    """Which metrics, beside which baselines."""

    k: tuple[Annotated[int, Field(ge=1)], ...] = (10, 20, 100)
    baselines: tuple[Baseline, ...] = ("popularity", "last_viewed", "markov", "covisitation", "als")
    bootstrap_samples: int = Field(1000, ge=10)
    confidence: float = Field(0.95, gt=0.5, lt=1)


class Index(Section):
    """Approximate index: the fastest whose recall against exact search holds."""

    min_recall: float = Field(0.95, gt=0, le=1)
    k: int = Field(100, ge=1, description="neighbours the recall is measured at")
    max_seconds: float = Field(600, ge=0, description="of the search for settings, about")
    max_mib: float | None = Field(None, gt=0, description="size of the index")
    max_milliseconds: float | None = Field(
        None, gt=0, description="of one processor per query, in batches of 100"
    )


class Export(Section):
    """What serving receives."""

    index: Index = Index()
    parity_queries: int = Field(256, ge=1, description="queries compared in a fresh process")
    filters: tuple[str, ...] = Field((), description="candidate features that requests filter by")
    availability: bool = Field(
        False, description="whether `recsys availability` can take items out of what is published"
    )
    overfetch: int = Field(
        10, ge=1, description="times as many candidates, at most, where some may not be returned"
    )
    diversity: Diversity | None = Field(None, description="without it scores alone order a list")
    exploration: Exploration | None = Field(
        None, description="without it no place is left to chance"
    )

    @model_validator(mode="after")
    def _check_pools(self) -> Export:
        diverse, explored = self.diversity, self.exploration
        if diverse is not None and explored is not None and explored.pool < diverse.pool:
            raise ValueError(
                f"exploration.pool={explored.pool} is below diversity.pool={diverse.pool}: what "
                "may be explored begins with what is made diverse"
            )
        return self


class Gate(Section):
    """What a model must show before it becomes the champion."""

    metric: str = Field("ndcg@20", pattern=r"^(recall|ndcg|mrr|hit_rate)@[1-9][0-9]*$")
    min_lift_over_baselines: float = Field(
        0.0,
        description="relative, over each counting baseline; its interval must be above 0, or above "
        "this if negative",
    )
    min_lift_over_champion: float = Field(
        0.0,
        description="relative, on the same window; its interval must be above 0, or above this if "
        "negative: -0.01 lets a model pass that surely loses less than 1 %",
    )
    max_slice_drop: float | None = Field(
        0.1, ge=0, description="relative, below the champion, in any slice; not asked if empty"
    )
    min_slice_queries: int = Field(200, ge=1, description="smaller slices are not judged")
    min_index_recall: float | None = Field(None, ge=0, le=1, description="against exact search")
    max_index_milliseconds: float | None = Field(None, gt=0, description="a query, in batches")
    max_index_bytes: int | None = Field(None, ge=1)


class Registry(Section):
    """Where the model is kept and when it is promoted."""

    model: str
    gate: Gate = Gate()


class Scoring(Section):
    """Batch scoring of all users."""

    k: int = Field(20, ge=1)
    table: str | None = Field(None, description="catalogue table; files in the run folder if empty")
    unavailable: str | None = Field(
        None,
        description="CSV file with a column `item`: what is not recommended; relative to the YAML "
        "file, needs a model of export.availability: true",
    )
    users_per_part: int = Field(
        5000, ge=1, description="of a Spark task: what a killed attempt does not have to do again"
    )
    only_changed: bool = Field(
        False, description="keep the last answers of users whose inputs, version and k are the same"
    )


class Cluster(Section):
    """The only section that differs between a laptop and a cluster."""

    kind: Literal["local", "mirrored", "spark", "spark_parameter_server"] = Field(
        "local",
        description="of training: this process, all its GPUs, workers on Spark that keep in step, "
        "or such that do not and have their tables on servers",
    )
    workers: int = Field(2, ge=1, description="of the kinds on Spark: a task each")
    servers: int = Field(
        1, ge=1, description="of kind spark_parameter_server: a task each, and one for the chief"
    )
    min_workers: int | None = Field(
        None, ge=1, description="go on with so few if the cluster has shrunk; all if empty"
    )
    max_restarts: int = Field(
        10, ge=0, description="after lost workers or outages, in a row without a newer checkpoint"
    )
    restart_seconds: float = Field(5, ge=0, description="wait before a restart, doubled each time")
    heartbeat_timeout_seconds: float = Field(
        60, ge=5, description="without a sign of life a worker counts as frozen"
    )
    progress_timeout_seconds: float = Field(
        1800,
        ge=1,
        description="without a finished step or validation batch a worker counts as hung",
    )
    master: str | None = Field("local[*]", description="Spark master; empty inside a Spark cluster")
    spark: dict[str, str] = Field({}, description="further Spark settings")
    tracking_uri: str | None = Field(None, description="MLflow; SQLite beside the runs if empty")
    experiment: str = "clickstream-recommender"

    def jobs(self, workers: int) -> tuple[str, ...]:
        """What each task of a training on Spark is, by rank; the first is the chief."""
        if self.kind == "spark":
            return ("worker",) * workers
        return ("chief",) + ("worker",) * workers + ("ps",) * self.servers

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
    monitoring: Monitoring = Monitoring()
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
        times = self.data.events.columns.time is not None
        self.model.check_events(times, items=bool(schema.item_histories))
        k = int(self.registry.gate.metric.split("@")[1])
        if k not in self.evaluation.k:
            raise ValueError(f"registry.gate.metric needs {k} in evaluation.k={self.evaluation.k}")
        names = [feature.name for feature in self.features]
        check_joint(self.model.joint, self.train, list(self.data.event_types), names)
        self._check_ranking()
        self._check_shown()
        self.monitoring.check_names(schema)
        self._check_filters()
        return self

    def _check_filters(self) -> None:
        """What can be filtered by is a value or a number of the item, and asked for by name."""
        kinds = ("id", "category", "number")
        valid = [f.name for f in self.schema_.candidate if f.kind in kinds]
        for name in self.export.filters:
            if name not in valid:
                raise ValueError(
                    f"export.filters: {name!r} is no candidate feature of kind id, category or "
                    f"number; there are {valid}"
                )
            if any(f.name == f"filter_{name}" for f in self.features):
                raise ValueError(
                    f"export.filters: requests give 'filter_{name}', which a feature is called too"
                )
        if len(set(self.export.filters)) < len(self.export.filters):
            raise ValueError(f"export.filters names one twice: {list(self.export.filters)}")

    def _check_ranking(self) -> None:
        """An answer of two stages has no more items than are ranked."""
        if self.ranking is None:
            return
        longest = {"evaluation.k": max(self.evaluation.k), "scoring.k": self.scoring.k}
        ends = {"diversity": self.export.diversity, "exploration": self.export.exploration}
        longest |= {f"export.{name}.pool": o.pool for name, o in ends.items() if o is not None}
        for key, k in longest.items():
            if k > self.ranking.candidates:
                raise ValueError(f"{key}={k} exceeds ranking.candidates={self.ranking.candidates}")
        strangers = sorted(set(self.ranking.tasks) - set(self.data.event_types))
        if strangers:
            raise ValueError(
                f"ranking.tasks: {strangers[0]!r} is none of data.event_types, which are "
                f"{list(self.data.event_types)}"
            )
        if self.ranking.tasks and self.data.held_out is not None:
            raise ValueError("ranking.tasks: the labels of `held_out` have no event types")

    def _check_shown(self) -> None:
        """What was shown is read by a ranker of one task."""
        if self.data.impressions is None:
            return
        if self.ranking is None:
            raise ValueError("data.impressions are read by a second stage: add `ranking`")
        if self.ranking.tasks:
            raise ValueError("ranking.tasks: impressions tell one label, `clicked`; remove either")
        numbers = [f.name for f in self.schema_.candidate if f.kind == "number"]
        for name in sorted(set(self.data.impressions.columns.values) - set(numbers)):
            key = "data.impressions.columns.values"
            raise ValueError(f"{key}: {name!r} is none of the candidates' numbers, {numbers}")

    @property
    def needs_outcomes(self) -> bool:
        """Whether what users do next, by event type, is to be prepared."""
        return self.ranking is not None and bool(self.ranking.tasks)

    @property
    def schema_(self) -> Schema:
        """The features as a schema."""
        return Schema(features=self.features)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `a.b=c` overrides, validate.

    Paths of sources, encoders, lists and runs are made absolute: relative to the file in the file,
    to the working directory in overrides.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, a value does not fit.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"config {file} does not exist; ready configs: `recsys configs`")
    try:
        tree = _absolute(OmegaConf.to_container(OmegaConf.load(file), resolve=True), file.parent)
        merged = OmegaConf.merge(tree, read_overrides(overrides))
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


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Read `a.b=c` overrides into a tree; relative paths are from the working directory.

    Raises:
        ConfigError: an override is not readable.
    """
    try:
        changes = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"overrides {list(overrides)} are not readable: {error}") from error
    return _absolute(changes, Path.cwd())


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
    data, features, train = tree.get("data"), tree.get("features"), tree.get("train")
    if isinstance(tree.get("scoring"), dict):
        yield tree["scoring"], "unavailable"
    for source in data.values() if isinstance(data, dict) else ():
        if isinstance(source, dict):
            yield source, "path"
    for feature in features if isinstance(features, list) else ():
        if isinstance(feature, dict):
            yield feature, "encoder"
    if isinstance(train, dict) and train.get("warm_start") != CHAMPION:
        yield train, "warm_start"


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
