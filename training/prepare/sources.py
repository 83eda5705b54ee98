"""Read the configured tables with Spark, and note which version of them was read."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from pyspark.errors import AnalysisException, ParseException, PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from recsys.artifacts import SourceVersion
from recsys.config import ConfigError, RunConfig
from recsys.data_config import Source
from recsys.schema import Feature, Schema
from training.prepare.columns import Columns, Home, home_of, sources_of, verify
from training.prepare.errors import PrepareError
from training.prepare.values import feature_value, identifier, wrong_value

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of a run.

    Attributes:
        events: the click table, columns as in the source and derived.
        items: `item`, `name` and `f_<feature>` of the candidate features it holds; one row an item.
        users: `user` and `f_<feature>` of the query and context features it holds.
        held_out: the table of held-out items, columns as in the source and derived.
        impressions: the table of shown items, likewise.
        homes: by feature (histories aside): the table its values come from, or `role`.
        versions: by table; rows of events, held-out and shown items are counted later.
    """

    events: DataFrame
    items: DataFrame | None
    users: DataFrame | None
    held_out: DataFrame | None
    impressions: DataFrame | None
    homes: dict[str, Home]
    versions: dict[str, SourceVersion]

    def versions_with(self, report: Mapping[str, int]) -> dict[str, SourceVersion]:
        """Return the versions, now that rows of events, held-out and shown items are counted."""
        read = {table: f"{table.replace('_', ' ')}: rows read" for table in self.versions}
        read["events"] = "events read"
        return self.versions | {
            table: self.versions[table].model_copy(update={"num_rows": report[key]})
            for table, key in read.items()
            if key in report
        }


def read_tables(spark: SparkSession, config: RunConfig) -> Tables:
    """Read events, items, users, held-out and shown items and check their columns.

    Raises:
        ConfigError: a table cannot be read, or a mapped column is missing.
        PrepareError: a number column of items or users holds something else.
    """
    sources = sources_of(config.data)
    frames = {name: _read(spark, f"data.{name}", source) for name, source in sources.items()}
    known = {name: Columns(tuple(f.columns), _uri(sources[name])) for name, f in frames.items()}
    verify(config, known)
    homes = {
        feature.name: home_of(feature, config.data, known)
        for feature in config.features
        if feature.kind != "history"
    }
    versions = {name: _version(spark, source) for name, source in sources.items()}
    entities: dict[str, DataFrame | None] = {"items": None, "users": None}
    for table in entities.keys() & frames.keys():
        entities[table], count = _entities(config, table, frames[table], homes)
        versions[table] = versions[table].model_copy(update={"num_rows": count})
        logger.info("data.%s: %d rows of %s", table, count, versions[table].uri)
    return Tables(
        frames["events"],
        **entities,
        held_out=frames.get("held_out"),
        impressions=frames.get("impressions"),
        homes=homes,
        versions=versions,
    )


def _read(spark: SparkSession, key: str, source: Source) -> DataFrame:
    try:
        if source.query is not None:
            frame = spark.sql(source.query.replace("{path}", source.path or ""))
        elif source.table is not None:
            frame = spark.read.options(**source.options).table(source.table)
        else:
            frame = spark.read.format(source.format).options(**source.options).load(source.path)
    except (AnalysisException, ParseException) as error:
        raise ConfigError(f"{key}: cannot read {_uri(source)}: {_first_line(error)}") from error
    for name, expression in source.derive.items():
        try:
            frame = frame.withColumn(name, F.expr(expression))
        except (AnalysisException, ParseException) as error:
            raise ConfigError(f"{key}.derive.{name}: {_first_line(error)}") from error
    return frame


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _uri(source: Source) -> str:
    return source.table or source.path or (source.query or "").strip()


def _version(spark: SparkSession, source: Source) -> SourceVersion:
    """Say what was read: the Delta version, or a hash of file names and sizes."""
    version = ""
    if source.table is not None or source.format == "delta":
        version = _delta_version(spark, source.table or f"delta.`{source.path}`")
    elif source.path is not None:
        # Columns other than `content` come from the listing: no file is opened.
        reader = spark.read.format("binaryFile").option("recursiveFileLookup", "true")
        files = reader.load(source.path).select("path", "length").collect()
        names = sorted((row["path"].rsplit("/", 1)[-1], row["length"]) for row in files)
        version = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    return SourceVersion(uri=_uri(source), num_rows=0, version=version)


def _delta_version(spark: SparkSession, table: str) -> str:
    """Return the number of the latest version, or nothing if the table keeps none."""
    try:
        return str(spark.sql(f"DESCRIBE HISTORY {table} LIMIT 1").first()["version"])
    except PySparkException:
        return ""


def _entities(
    config: RunConfig, table: str, frame: DataFrame, homes: Mapping[str, Home]
) -> tuple[DataFrame, int]:
    """Return one row per item or user with its features, and how many rows the table has."""
    source = sources_of(config.data)[table]
    key, role = ("item", "items") if table == "items" else ("user", "users")
    features = [feature for feature in config.features if homes.get(feature.name) == role]
    own = identifier(frame, getattr(source, "key"), f"data.{table}.key")  # noqa: B009
    values = [
        feature_value(frame, feature, f"data.{table}", "iso").alias(f"f_{feature.name}")
        for feature in features
    ]
    owner = F.concat(F.lit(f"{key} "), F.coalesce(own, F.lit("null")))
    count = _check_values(f"data.{table}", frame, features, owner)
    if count == 0:
        raise PrepareError(f"data.{table}: {_uri(source)} is empty; expected a row per {key}")
    names = [F.lit(None).cast("string").alias("name")] if table == "items" else []
    wanted = config.data.item_name
    if names and wanted is not None and wanted in Columns(tuple(frame.columns), ""):
        names = [identifier(frame, wanted, "data.item_name").alias("name")]
    rows = frame.select(own.alias(key), *names, *values).filter(F.col(key).isNotNull())
    others = [name for name in rows.columns if name != key]
    if not others:
        return rows.distinct(), count
    # A key that comes twice gets one of its rows, always the same one.
    one = rows.groupBy(key).agg(F.min(F.struct(*others)).alias("row"))
    return one.select(key, *(F.col("row")[name].alias(name) for name in others)), count


def _check_values(key: str, frame: DataFrame, features: list[Feature], owner: Column) -> int:
    """Return the number of rows; refuse numbers and vectors that are none."""
    wrong = [(f, text) for f in features if (text := wrong_value(f, owner)) is not None]
    counts = [count for _, text in wrong for count in (F.count(text), F.min(text))]
    found = list(frame.agg(F.count(F.lit(1)), *counts).first())
    for (feature, _), num_wrong, example in zip(wrong, found[1::2], found[2::2], strict=True):
        if num_wrong:
            where = f"{key}, feature {feature.name!r}"
            refuse_type(where, feature.source_column, num_wrong, example, feature.vector_dim)
    return int(found[0])


def attach_features(events: DataFrame, tables: Tables, schema: Schema) -> DataFrame:
    """Add what events need of the other tables: users' features, and items' that have vocabularies.

    Vocabularies count in events, and a history may list a column of the item table.
    """
    for table, key, frame in (("items", "item", tables.items), ("users", "user", tables.users)):
        names = [
            f"f_{feature.name}"
            for feature in schema.features
            if tables.homes.get(feature.name) == table
            and (table == "users" or feature.has_vocabulary)
        ]
        if frame is not None and names:
            events = events.join(frame.select(key, *names), key, "left")
    return events


def refuse_type(key: str, name: str, num_wrong: int, example: str, dim: int | None = None) -> None:
    """Raise the error of a column that holds something else than numbers, or vectors of `dim`.

    Raises:
        PrepareError: always.
    """
    expected = "numbers" if dim is None else f"arrays of {dim} finite numbers"
    raise PrepareError(
        f"{key}: wrong type: expected {expected} in column {name!r}, but {num_wrong} values are "
        f"none, such as {example!r}; convert it with `derive` or drop such rows with "
        "`data.cleaning.drop`"
    )
