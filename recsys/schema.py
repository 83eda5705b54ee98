"""Columns of a recommender, once: for Spark, tf.Example, the model inputs and the signatures."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Side = Literal["query", "context", "candidate"]
Kind = Literal["id", "category", "number", "text", "time", "history", "vector"]
Table = Literal["events", "items", "users"]

#: Fields of a training example and of a corpus record that no feature may be called.
RESERVED = frozenset(
    {"label", "weight", "user", "time", "exclusions", "item", "name", "count", "labels", "k"}
    | {"known", "sequence", "row", "candidates", "retrieval_scores", "label_place"}
    | {"outcome_items", "outcome_events", "task_labels", "shown_items", "shown_positions"}
    | {"positions", "judged"}
)
_AS_SHOWN = "as_shown_"


def as_shown(name: str) -> str:
    """Field of a candidate's number as it was when shown.

    >>> as_shown("price")
    'as_shown_price'
    """
    return f"{_AS_SHOWN}{name}"


class Vocabulary(BaseModel):
    """Rule by which the values of an id or category feature get their rows of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_count: int = Field(1, ge=1, description="training occurrences a value needs")
    max_size: int | None = Field(None, ge=1, description="most frequent values kept")
    oov: int = Field(1, ge=1, description="hash buckets shared by all other values")


class Feature(BaseModel):
    """One column: where it comes from, which tower reads it, how it is encoded.

    `query` features are known from the last event before the label (or from the user table),
    `context` features are those of the request itself, `candidate` features describe the item.
    A `history` is the list of the past values of the feature named by `of`, oldest first, and
    shares its vocabulary and embedding table. A `text` is hashed words, whose embeddings are
    learned, or the frozen vector of a pretrained `encoder`; a `vector` is a column of arrays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")
    side: Side
    kind: Kind
    column: str | None = Field(
        None, description="column of the table, or the role user, item, time or event"
    )
    table: Table | None = Field(None, description="table that holds the column")
    of: str | None = Field(None, description="feature whose past values a history lists")
    length: int = Field(20, ge=1, description="most recent values kept (history), words (text)")
    vocabulary: Vocabulary = Vocabulary()
    buckets: int = Field(10_000, ge=1, description="hash buckets of the words of a text")
    ngrams: int = Field(1, ge=1, le=5, description="longest word n-gram of a text that is hashed")
    encoder: str | None = Field(
        None, description="pretrained SavedModel from text to vector; relative to the YAML file"
    )
    dim: int | None = Field(
        None, ge=1, description="embedding size, the model's when empty; numbers in a vector"
    )

    @model_validator(mode="after")
    def _check(self) -> Feature:
        if self.name in RESERVED:
            raise ValueError(f"{self.name!r} is a reserved name; reserved are {sorted(RESERVED)}")
        if self.name.startswith(_AS_SHOWN):
            raise ValueError(f"{self.name!r}: names that begin with {_AS_SHOWN!r} are reserved")
        if (self.kind == "history") != (self.of is not None):
            raise ValueError("`of` names the feature a history lists: kind history, and only it")
        if self.kind == "history" and self.side != "query":
            raise ValueError("a history belongs to side query")
        self._check_content()
        return self

    def _check_content(self) -> None:
        if self.kind == "vector" and self.dim is None:
            raise ValueError("a vector needs `dim`, how many numbers it has")
        if self.encoder is not None and self.kind != "text":
            raise ValueError("`encoder` belongs to kind text")
        if self.encoder is not None and self.dim is not None:
            raise ValueError("an `encoder` brings its own `dim`: remove it")
        if self.ngrams > 1 and not self.is_hashed:
            raise ValueError("`ngrams` belongs to kind text without `encoder`")

    @property
    def source_column(self) -> str:
        """Column (or role) that the value is read from."""
        return self.column or self.name

    @property
    def dtype(self) -> Literal["string", "float", "int64"]:
        """Type of the raw value in records and signatures (a time is microseconds since 1970)."""
        if self.kind in ("number", "vector"):
            return "float"
        return "int64" if self.kind == "time" else "string"

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Shape of one raw value: `()`, `(None,)` of a history, `(dim,)` of a vector."""
        if self.vector_dim:
            return (self.vector_dim,)
        return (None,) if self.is_list else ()

    @property
    def vector_dim(self) -> int | None:
        """Numbers in a raw value, None where it is no vector."""
        return self.dim if self.kind == "vector" else None

    @property
    def is_list(self) -> bool:
        """Whether the raw value is a list of any length."""
        return self.kind == "history"

    @property
    def is_hashed(self) -> bool:
        """Whether the value is a text whose words are hashed and learned."""
        return self.kind == "text" and self.encoder is None

    @property
    def is_measured(self) -> bool:
        """Whether the value is a number, or is encoded as a few of them."""
        return self.kind in ("number", "time")

    @property
    def has_vocabulary(self) -> bool:
        """Whether the values are looked up in a vocabulary of their own."""
        return self.kind in ("id", "category")


def filter_input(feature: str) -> str:
    """Input of the served signatures that filters items by a candidate feature."""
    return f"filter_{feature}"


def missing_value(feature: Feature) -> str | float | int | list[float]:
    """What stands for a missing value in records and requests."""
    if feature.vector_dim:
        return [0.0] * feature.vector_dim
    missing: dict[str, str | float | int] = {"string": "", "float": math.nan, "int64": -1}
    return missing[feature.dtype]


class Schema(BaseModel):
    """All features of a run, in the order in which the towers read them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: tuple[Feature, ...]

    @model_validator(mode="after")
    def _check(self) -> Schema:
        names = [feature.name for feature in self.features]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"feature names must be unique; given twice: {twice}")
        for feature in self.features:
            if feature.of is not None:
                self._check_history(feature)
        lengths = {f.name: f.length for f in self.histories()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"histories list the same events, so their `length` must be equal; got {lengths}"
            )
        if not self.query or not self.candidate:
            raise ValueError("at least one query or context and one candidate feature are needed")
        return self

    def _check_history(self, feature: Feature) -> None:
        listed = next((other for other in self.features if other.name == feature.of), None)
        if listed is None or not listed.has_vocabulary:
            valid = [other.name for other in self.features if other.has_vocabulary]
            raise ValueError(
                f"history {feature.name!r} lists {feature.of!r}, "
                f"which is no id or category feature; there are {valid}"
            )

    def __getitem__(self, name: str) -> Feature:
        for feature in self.features:
            if feature.name == name:
                return feature
        raise KeyError(f"no feature {name!r}; there are {[f.name for f in self.features]}")

    @property
    def query(self) -> tuple[Feature, ...]:
        """Inputs of the query tower: query and context features."""
        return tuple(f for f in self.features if f.side != "candidate")

    @property
    def candidate(self) -> tuple[Feature, ...]:
        """Inputs of the candidate tower."""
        return tuple(f for f in self.features if f.side == "candidate")

    @property
    def vocabularies(self) -> tuple[Feature, ...]:
        """Features that own a vocabulary."""
        return tuple(f for f in self.features if f.has_vocabulary)

    @property
    def item_histories(self) -> tuple[Feature, ...]:
        """Histories that list item ids."""
        return tuple(f for f in self.histories() if self[f.of or ""].source_column == "item")

    @property
    def user_ids(self) -> tuple[Feature, ...]:
        """Query features that hold the user's id."""
        return tuple(f for f in self.query if f.kind == "id" and f.source_column == "user")

    def histories(self) -> Iterator[Feature]:
        """Yield the history features."""
        return (f for f in self.features if f.kind == "history")

    @property
    def history_length(self) -> int:
        """Most recent events that a query lists; 0 without a history."""
        return max((feature.length for feature in self.histories()), default=0)

    def differences(self, other: Schema) -> list[str]:
        """What is different in the other schema, a sentence each; empty when nothing is."""
        ours = {f.name: f.model_dump() for f in self.features}
        theirs = {f.name: f.model_dump() for f in other.features}
        found = [f"{name!r} is new" for name in theirs if name not in ours]
        found += [f"{name!r} is missing" for name in ours if name not in theirs]
        found += [
            f"{name!r}.{key} was {ours[name][key]!r}, is {value!r}"
            for name in theirs
            if name in ours
            for key, value in theirs[name].items()
            if ours[name][key] != value
        ]
        if not found and self != other:
            found.append("the features stand in another order")
        return found

    @property
    def fingerprint(self) -> str:
        """Hash of everything that training and serving must agree on."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
