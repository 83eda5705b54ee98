"""Which table holds which column, checked from file headers before Spark starts."""

from __future__ import annotations

import bz2
import csv
import difflib
import glob
import gzip
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from recsys.config import ConfigError, RunConfig, is_uri
from recsys.data_config import Data, EventColumns, HeldOutColumns, ImpressionColumns, Source
from recsys.schema import Feature

Home = Literal["role", "events", "items", "users"]

#: Enough of a JSON file to meet every key that most records have.
_JSON_LINES = 1000


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a table.

    Attributes:
        names: as Spark will see them, derived ones included.
        where: file or table, for messages.
        complete: False when rare columns may be missing from `names` (a long JSON file).
    """

    names: tuple[str, ...]
    where: str
    complete: bool = True

    def __contains__(self, name: object) -> bool:
        # Spark resolves column names without regard to case.
        return str(name).lower() in {own.lower() for own in self.names}


def check_columns(config: RunConfig) -> None:
    """Check that the mapped columns exist, as far as file headers tell it without Spark.

    Raises:
        ConfigError: a path does not exist, or a column does not; the message names key, file,
            column and the nearest valid name. Or an `encoder` is no SavedModel.
    """
    known = {}
    for table, source in sources_of(config.data).items():
        found = _read_header(f"data.{table}", source)
        if found is not None:
            names = (*found.names, *(n for n in source.derive if n not in found.names))
            known[table] = Columns(names, found.where, found.complete)
    verify(config, known)
    _check_encoders(config)


def _check_encoders(config: RunConfig) -> None:
    for index, feature in enumerate(config.features):
        path = feature.encoder
        if path is None or is_uri(path) or (Path(path) / "saved_model.pb").is_file():
            continue
        found = "a folder without it" if Path(path).is_dir() else "no such folder"
        raise ConfigError(
            f"features.{index}.encoder: feature {feature.name!r} expects a SavedModel, a folder "
            f"with saved_model.pb (as TF Hub's archives unpack to), at {path}, found {found}"
        )


def sources_of(data: Data) -> dict[str, Source]:
    """Return the configured tables by name: events, items, users, held_out, impressions."""
    tables = {
        "events": data.events,
        "items": data.items,
        "users": data.users,
        "held_out": data.held_out,
        "impressions": data.impressions,
    }
    return {name: source for name, source in tables.items() if source is not None}


def verify(config: RunConfig, known: Mapping[str, Columns]) -> None:
    """Check every mapped column against the tables whose columns are known.

    Raises:
        ConfigError: a column does not exist, or a feature asks for an impossible table.
    """
    data = config.data
    if data.cleaning.max_events_per_day is not None and data.events.columns.time is None:
        raise ConfigError("data.cleaning.max_events_per_day needs data.events.columns.time")
    for key, column, table in _mapped(data):
        if table in known:
            _require(key, column, (known[table],))
    if data.item_name is not None:
        _require_any("data.item_name", data.item_name, ("items", "events"), data, known)
    for index, feature in enumerate(config.features):
        if feature.kind != "history":
            _verify_feature(f"features.{index}", feature, data, known)


def home_of(feature: Feature, data: Data, known: Mapping[str, Columns]) -> Home:
    """Return the table (or `role`) that a feature's values are read from."""
    if feature.table in (None, "events") and _is_role(feature.source_column, data):
        return "role"
    if feature.table is not None:
        return feature.table
    first: Home = "items" if feature.side == "candidate" else "events"
    second: Home = "events" if feature.side == "candidate" else "users"
    if first in known and feature.source_column in known[first]:
        return first
    return second if second in sources_of(data) else "events"


def _is_role(column: str, data: Data) -> bool:
    roles = data.events.columns
    given = {"user": roles.user, "item": roles.item, "time": roles.time, "event": roles.event}
    return given.get(column) is not None


def _mapped(data: Data) -> Iterator[tuple[str, str, str]]:
    """Yield key, column and table of everything that the config maps, features aside."""
    yield from _roles("events", data.events.columns)
    if data.split.kind == "given":
        yield "data.split.column", data.split.column, "events"
    for table, source in (("items", data.items), ("users", data.users)):
        if source is not None:
            yield f"data.{table}.key", source.key, table
    if data.held_out is not None:
        yield from _roles("held_out", data.held_out.columns)
    if data.impressions is not None:
        yield from _roles("impressions", data.impressions.columns)


def _roles(
    table: str, columns: EventColumns | HeldOutColumns | ImpressionColumns
) -> Iterator[tuple[str, str, str]]:
    for role, mapped in columns:
        key = f"data.{table}.columns.{role}"
        if isinstance(mapped, tuple):
            yield from ((f"{key}.{index}", column, table) for index, column in enumerate(mapped))
        elif isinstance(mapped, dict):
            yield from ((f"{key}.{name}", column, table) for name, column in mapped.items())
        elif mapped is not None:
            yield key, mapped, table


def _verify_feature(key: str, feature: Feature, data: Data, known: Mapping[str, Columns]) -> None:
    candidate = feature.side == "candidate"
    allowed = ("items", "events") if candidate else ("events", "users")
    if feature.table is not None and feature.table not in allowed:
        raise ConfigError(
            f"{key}.table: feature {feature.name!r} of side {feature.side} cannot be read from "
            f"{feature.table!r}; valid tables are {', '.join(allowed)}"
        )
    if feature.table is not None and feature.table not in sources_of(data):
        raise ConfigError(
            f"{key}.table: feature {feature.name!r} wants table {feature.table!r}, "
            f"but data.{feature.table} is not set"
        )
    if feature.table in (None, "events") and _is_role(feature.source_column, data):
        if feature.kind == "vector":
            raise ConfigError(
                f"{key}.column: feature {feature.name!r} of kind vector needs a column of arrays, "
                f"found the role {feature.source_column!r}"
            )
        return
    tables = (feature.table,) if feature.table else allowed
    _require_any(f"{key}.column", feature.source_column, tables, data, known)
    if feature.side == "context" and home_of(feature, data, known) == "events":
        # A request is no event, so its own table has to tell what it was asked with.
        _require_any(f"{key}.column", feature.source_column, ("impressions",), data, known)


def _require_any(
    key: str, column: str, tables: tuple[str, ...], data: Data, known: Mapping[str, Columns]
) -> None:
    present = [table for table in tables if table in sources_of(data)]
    if present and all(table in known for table in present):
        found = tuple(known[table] for table in present)
        if all(table.complete for table in found):
            _require(key, column, found)


def _require(key: str, column: str, tables: tuple[Columns, ...]) -> None:
    if any(column in table for table in tables):
        return
    names = [name for table in tables for name in table.names]
    close = difflib.get_close_matches(column, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if names and all(name.startswith("_c") for name in names):
        hint = "the file is read without a header: set options.header to 'true'. "
    where = " and ".join(table.where for table in tables)
    raise ConfigError(
        f"{key}: expected a column {column!r} in {where}, found none; {hint}"
        f"columns are {', '.join(names)}"
    )


def _read_header(key: str, source: Source) -> Columns | None:
    """Return the columns of a file, or None when only Spark can tell them."""
    if source.path is None or is_uri(source.path):
        return None
    file = _first_file(key, source.path)
    if source.query is not None or file is None:
        return None
    reader = {"csv": _csv_header, "json": _json_header, "parquet": _parquet_header}
    if source.format == "text":
        return Columns(("value",), str(file))
    return reader[source.format](file, source) if source.format in reader else None


def _first_file(key: str, path: str) -> Path | None:
    matches = [Path(path)] if Path(path).exists() else sorted(map(Path, glob.glob(path)))  # noqa: PTH207
    if not matches:
        parent = Path(path).parent
        names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        close = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {parent / close[0]}?" if close else ""
        raise ConfigError(
            f"{key}.path: expected a file, folder or glob, found nothing at {path}{hint}"
        )
    files = (file for match in matches for file in ([match] if match.is_file() else _inside(match)))
    return next(files, None)


def _inside(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        hidden = any(part[0] in "._" for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden:
            yield file


def _open(file: Path, encoding: str) -> IO[str]:
    openers = {".gz": gzip.open, ".bz2": bz2.open}
    opener: Any = openers.get(file.suffix, open)
    stream: IO[str] = opener(file, "rt", encoding=encoding, errors="replace", newline="")
    return stream


def _csv_header(file: Path, source: Source) -> Columns | None:
    options = {key.lower(): value for key, value in source.options.items()}
    sep = options.get("sep", options.get("delimiter", ",")).replace("\\t", "\t")
    encoding = options.get("encoding", options.get("charset", "utf-8"))
    if len(sep) != 1 or file.suffix in (".zst", ".lz4", ".snappy", ".deflate"):
        return None
    # A byte order mark is no part of the first name.
    encoding = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
    with _open(file, encoding) as stream:
        lines = csv.reader(stream, delimiter=sep, quotechar=options.get("quote", '"') or None)
        first = next((line for line in lines if line), [])
    if options.get("header", "false").lower() != "true":
        return Columns(tuple(f"_c{index}" for index in range(len(first))), str(file))
    return Columns((*first, *_partition_columns(file)), str(file))


def _json_header(file: Path, source: Source) -> Columns | None:
    if source.options.get("multiLine", "false").lower() == "true":
        return None
    names: dict[str, None] = {}
    with _open(file, "utf-8-sig") as stream:
        for line in itertools.islice(stream, _JSON_LINES):
            try:
                record = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError:
                return None
            names.update(dict.fromkeys(record if isinstance(record, dict) else ()))
        complete = not stream.readline()
    return Columns((*names, *_partition_columns(file)), str(file), complete)


def _parquet_header(file: Path, source: Source) -> Columns | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = tuple(pq.read_schema(file).names)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{source.path}: expected Parquet, {file} is none: {error}") from error
    return Columns((*names, *_partition_columns(file)), str(file))


def _partition_columns(file: Path) -> list[str]:
    """Return the columns that are folder names such as `day=2024-01-01`."""
    return [part.split("=")[0] for part in file.parent.parts if "=" in part]
