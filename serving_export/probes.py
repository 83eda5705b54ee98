"""What of a table is counted: the distributions of query features and of recommendations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyspark.sql import Column
from pyspark.sql import functions as F

from recsys.artifacts import PreparedData
from recsys.monitoring_config import ITEMS, SCORES, distributions_of
from recsys.schema import Feature


@dataclass(frozen=True, slots=True)
class Probe:
    """The values that a row adds to one distribution.

    Attributes:
        name: of the distribution.
        column: of the table; a table without it has nothing but missing values.
        values: from the column to an array of doubles (of a number) or of strings.
        is_number: whether the values are cut at quantiles.
        vocabulary: file of the values that the model knows, if there is one.
        is_own_id: whether nearly each row has a value of its own, so that only known or not counts.
    """

    name: str
    column: str
    values: Callable[[Column], Column]
    is_number: bool = False
    vocabulary: Path | None = None
    is_own_id: bool = False


def feature_probes(data: PreparedData) -> list[Probe]:
    """Distributions of the query features of a model, from the data it was trained on."""
    return [probe for feature in data.features.query for probe in _probes(feature, data)]


def answer_probes() -> list[Probe]:
    """Distributions of what was recommended: the items, and all scores."""
    return [
        Probe(ITEMS, "items", lambda items: items),
        Probe(SCORES, "scores", lambda scores: scores.cast("array<double>"), is_number=True),
    ]


def _probes(feature: Feature, data: PreparedData) -> Iterator[Probe]:
    column, (name, *lengths) = feature.name, distributions_of(feature)
    if feature.kind == "history":
        listed = data.features[feature.of or ""].name
        yield Probe(name, column, lambda past: past, vocabulary=_file(data, listed))
        yield Probe(lengths[0], column, lambda past: _one(F.size(past)), is_number=True)
    elif feature.has_vocabulary:
        is_own = feature in data.features.user_ids
        yield Probe(name, column, _one_text, vocabulary=_file(data, column), is_own_id=is_own)
    elif feature.kind == "time":
        yield Probe(name, column, _hour)
    else:
        number = {"vector": _norm, "text": _words}.get(feature.kind, _one)
        yield Probe(name, column, number, is_number=True)


def _file(data: PreparedData, feature: str) -> Path:
    return (data.directory / data.vocabularies[feature].path).resolve()


def _one(value: Column) -> Column:
    return F.array(value.cast("double"))


def _one_text(value: Column) -> Column:
    return F.array(value.cast("string"))


def _hour(micros: Column) -> Column:
    hours = F.floor(micros.cast("bigint") / 3_600_000_000) % 24
    return F.array(F.when(micros >= 0, F.lpad(hours.cast("string"), 2, "0")))


def _norm(vector: Column) -> Column:
    return _one(F.sqrt(F.aggregate(vector, F.lit(0.0).cast("double"), lambda s, v: s + v * v)))


def _words(text: Column) -> Column:
    words = F.size(F.split(F.trim(text), r"\s+"))
    return _one(F.when(F.trim(text) != "", words))
