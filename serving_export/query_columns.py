"""What a model is asked by: its query features, in their order, and which of them tell who asks.

Read from the contract inside the SavedModel, as a version of another package may answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa

from recsys.artifacts import ArtifactError

_EXCLUSIONS = "exclusions"


def read_contract(variant: Path) -> dict[str, Any]:
    """Read the contract of a SavedModel."""
    contract: dict[str, Any]
    contract = json.loads((variant / "assets.extra" / "contract.json").read_text("utf-8"))
    return contract


@dataclass(frozen=True, slots=True)
class QueryColumns:
    """Columns that a model takes.

    Attributes:
        features: query and context features, in the order of the schema.
        histories: those that list events; a request gives all of them in one width.
        identifying: histories of items and ids of users, without any of which a query is answered
            by popularity; all features where the schema has neither.
        further: `exclusions` and what filters take.
    """

    features: tuple[str, ...]
    histories: tuple[str, ...]
    identifying: tuple[str, ...]
    further: tuple[str, ...]

    @classmethod
    def of(cls, contract: Mapping[str, Any]) -> QueryColumns:
        """Tell them from a contract."""
        features = {one["name"]: one for one in contract["features"]}
        asked = [name for name, one in features.items() if one["side"] != "candidate"]
        histories = [name for name in asked if features[name]["kind"] == "history"]
        identifying = [
            name
            for name in asked
            if (name in histories and _source(features[features[name]["of"]]) == "item")
            or (features[name]["kind"] == "id" and _source(features[name]) == "user")
        ]
        filters = [one["input"] for one in contract.get("filters", {}).values()]
        return cls(
            tuple(asked), tuple(histories), tuple(identifying or asked), (_EXCLUSIONS, *filters)
        )

    def check(self, columns: Sequence[str], table: str) -> None:
        """Refuse columns of which none tells who asks.

        Args:
            columns: names that are there.
            table: what has them, for the message.

        Raises:
            ArtifactError: everybody would get the popular items.
        """
        if set(self.identifying) & set(columns):
            return
        raise ArtifactError(
            f"{table} has none of the columns that tell what to recommend to whom: expected "
            f"{' or '.join(map(repr, self.identifying))}, found {', '.join(columns) or 'none'}"
            f"{self._meant(columns)}. Name columns as the query features: "
            f"{', '.join(self.features)}"
        )

    def unknown(self, columns: Sequence[str]) -> str:
        """Name the columns that the model does not know, with what may be meant; "" for none."""
        known = {"user", *self.features, *self.further}
        strange = [name for name in columns if name not in known]
        return ", ".join(map(repr, strange)) + self._meant(columns) if strange else ""

    def _meant(self, columns: Sequence[str]) -> str:
        """Pair columns with the nearest query feature that is not among them."""
        absent = {name.lower(): name for name in self.features if name not in columns}
        pairs = [
            f"{absent[near]!r} by {name!r}"
            for name in columns
            if name not in {"user", *self.features, *self.further}
            for near in get_close_matches(name.lower(), absent, n=1)
        ]
        return f" (did you mean {', '.join(pairs)}?)" if pairs else ""

    def call(self, function: str) -> str:
        """Tell how SQL calls the model by position."""
        return f"{function}({', '.join([*self.features, 'k'])})"

    def from_arguments(self, arguments: Sequence[pa.Array]) -> tuple[dict[str, pa.Array], int]:
        """Name the arguments of a call: a struct of columns, or all features in order; then k.

        Returns:
            Columns by name, and k.

        Raises:
            ArtifactError: there are more or fewer, none tells who asks, or k is no integer that is
                the same in all rows.
        """
        *given, k = arguments or [pa.nulls(0)]
        wanted = k.unique().to_pylist() if pa.types.is_integer(k.type) else []
        is_struct = len(given) == 1 and pa.types.is_struct(given[0].type)
        fits = is_struct or len(given) == len(self.features)
        if not fits or len(wanted) != 1 or wanted[0] is None:
            raise ArtifactError(
                f"expected {self.call('recommend')}, query features in this order, or "
                "recommend(struct(*), k), a struct of them by name, and one number k for all rows; "
                f"got {_types(arguments)}{f' and k {wanted[:3]}' if fits else ''}"
            )
        if not is_struct:
            return dict(zip(self.features, given, strict=True)), int(wanted[0])
        names = [field.name for field in given[0].type]
        self.check(names, "the struct that recommend was given")
        return dict(zip(names, given[0].flatten(), strict=True)), int(wanted[0])


def _source(feature: Mapping[str, Any]) -> str:
    """Column (or role) that a feature is read from."""
    return str(feature["column"] or feature["name"])


def _types(arguments: Iterable[pa.Array]) -> str:
    return f"({', '.join(str(one.type) for one in arguments)})"
