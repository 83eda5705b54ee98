"""Score a table of users with a registered model, in Spark, or let SQL ask it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow as tf
from pyspark import TaskContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recsys.artifacts import ArtifactError, Scoring
from recsys.config import RunConfig
from recsys.list_config import PROPENSITIES
from serving_export.arrow_scorer import ArrowScorer, number_lists
from serving_export.partial import resumed
from serving_export.query_columns import QueryColumns, read_contract
from serving_export.registry import CHAMPION, ModelVersion, describe, download, resolve
from serving_export.unavailable import (
    compared,
    listing,
    read_items,
    write_items,
    write_listing,
)
from serving_export.unchanged import (
    HASH,
    INPUTS,
    KEPT,
    LISTS,
    json_hash,
    last_result,
    with_inputs,
    with_last,
)

logger = logging.getLogger(__name__)

_RESULT = "recommendations"
_MODEL = "model"
_COUNTS = "part int, num_users bigint, num_kept bigint, found boolean"
#: What was not available, beside the result, as `scoring.unavailable` names it.
UNAVAILABLE = "unavailable.csv"
_ITEM = "item"
_NUM_KEPT = "num_kept"
#: Users whose answers a task holds at once.
_ROWS = 4096
_COLUMNS = ("user", "items", "scores", "model", "model_version", INPUTS)


def score(
    config: RunConfig,
    spark: SparkSession,
    users: str,
    directory: Path,
    model: str | None = None,
    last: Scoring | None = None,
) -> Scoring:
    """Recommend `scoring.k` items to every user.

    Writes one row per user (`user`, `items`, `scores`, `model`, `model_version`, `inputs`, and
    `propensities` where the model explores; lists are shorter than k where fewer items may be
    recommended) to the table `scoring.table`, or to Parquet in `directory`, which is replaced as a
    whole.

    With `scoring.only_changed` or `last`, users whose columns, version, k and list of what is not
    available are those of the last scoring keep its answer; the result is that of scoring all. A
    model that explores draws for all anew.
    `inputs` is a hash of these.

    Users are parted by a hash of their id, and each part is written by the task that scores it. An
    attempt that was killed or failed leaves its finished parts beside `directory`; the next one
    with the same model, k and users does the others.

    Args:
        config: `registry.model`, `scoring`; the items that `scoring.unavailable` lists are not
            recommended.
        spark: session; executors need this package, TensorFlow and MLflow, and share `directory`.
        users: folder of Parquet files, or a table: `user`, query features, maybe `exclusions` and
            what the model's filters take.
        directory: of the result, on a file system that driver and executors share.
        model: `name@alias` or `name/version`; the champion if not given. An alias is resolved
            once, so that all rows come from one version.
        last: an earlier scoring, whose answers to the same inputs are kept. When not given and
            `scoring.only_changed`, that of `scoring.table`, or else of `directory`.

    Raises:
        ArtifactError: there is no such model, or no champion yet, or it cannot be told what is not
            available, or `users` has no column `user` or none that tells the model who asks, or
            its rows changed while they were scored.
    """
    chosen = resolve(model or f"{config.registry.model}@{CHAMPION}")
    logger.info("scoring with %s", chosen.uri)
    table = _read(spark, users)
    num_users, content = _content(table, users)
    parts = max(1, math.ceil(num_users / config.scoring.users_per_part))
    listed = _listed(config)
    copy = f"{_MODEL}-{_identity(chosen)}{_suffix(listed)}"
    plan = {"copy": copy, "k": config.scoring.k, "content": content, "parts": parts}
    plan["columns"] = _COLUMNS
    directory = directory.resolve()
    asked = table.columns
    # After what the content is told by: a part is the same whether its answers were kept or not.
    version = describe(chosen) | {"copy": _MODEL + _suffix(listed)}
    table = with_inputs(table, version, config.scoring.k)
    answers = _last(config, spark, directory, last)
    with resumed(directory, json.dumps(plan)) as folder:
        result = folder / _RESULT
        result.mkdir(exist_ok=True)
        _copy(chosen, folder / copy, listed)
        _check(asked, folder / copy, users)
        if answers is not None and PROPENSITIES in number_lists(folder / copy):
            logger.info("%s explores: nobody keeps an answer", chosen.uri)
            answers = None
        if answers is not None:
            table = with_last(table, answers)
        if listed is not None:
            write_items(folder / UNAVAILABLE, _ITEM, listed)
        found, kept = _write_parts(table, parts, folder / copy, chosen, config.scoring.k)
        if found != num_users:
            raise ArtifactError(
                f"{users} had {num_users} rows before and {found} while it was scored: score a "
                "table that stays, such as one version of a Delta table"
            )
        if answers is not None:
            logger.info("%d of %d users keep their answers: nothing has changed", kept, found)
        shutil.rmtree(folder / copy)
        for leftover in result.glob(".part-*"):
            leftover.unlink()
        if config.scoring.table:
            written = spark.read.parquet(str(result))
            # A Delta table of an earlier version of this package has fewer columns.
            writer = written.write.mode("overwrite").option("overwriteSchema", "true")
            writer.saveAsTable(config.scoring.table)
            shutil.rmtree(result)
        scoring = Scoring(
            directory=folder,
            destination=config.scoring.table or _RESULT,
            num_users=num_users,
            num_kept=kept,
            k=config.scoring.k,
            name=chosen.name,
            model_version=chosen.version,
        ).save()
    return scoring.model_copy(update={"directory": directory})


def register_function(
    config: RunConfig,
    spark: SparkSession,
    directory: Path,
    model: str | None = None,
    name: str = "recommend",
) -> ModelVersion:
    """Let SQL ask a registered model: `SELECT user, recommend(user_id, history, 10) FROM users`.

    Arguments are all query and context features in the order of the schema (it is logged), or a
    struct of them by name, some of which may be absent, and maybe `exclusions`:
    `recommend(struct(*), 10)`; then how many items. The result has `items` and `scores`, best
    first, and `propensities` where the model explores. The version is the one that an alias means
    now, and what `scoring.unavailable` lists now is not recommended: both stay until the function
    is registered again.

    Args:
        config: `registry.model`, `scoring.unavailable`.
        spark: session; executors need what `score` needs.
        directory: where a copy of the model is kept, on a file system that all share.
        model: as for `score`.
        name: of the function.
    """
    chosen = resolve(model or f"{config.registry.model}@{CHAMPION}")
    listed = _listed(config)
    known_by = f"{chosen.name}-{chosen.version}-{_identity(chosen)}{_suffix(listed)}"
    copy = directory.resolve() / known_by
    _copy(chosen, copy, listed)
    asked, numbers = _query_columns(copy), number_lists(copy)
    lists = ", ".join(f"{each}: array<float>" for each in numbers)
    function = F.arrow_udf(_function(str(copy), asked), f"struct<items: array<string>, {lists}>")
    if PROPENSITIES in numbers:
        # Spark may ask twice, and show another answer than it has filtered by.
        function = function.asNondeterministic()
    spark.udf.register(name, function)
    logger.info("%s answers %s and %s(struct(*), k)", chosen.uri, asked.call(name), name)
    return chosen


def _read(spark: SparkSession, users: str) -> DataFrame:
    is_path = "/" in users or Path(users).exists()
    table = spark.read.parquet(users) if is_path else spark.table(users)
    if "user" not in table.columns:
        raise ArtifactError(
            f"{users} has no column 'user', only {', '.join(table.columns)}: it needs a row per "
            "user and the query features by name"
        )
    return table


def _last(
    config: RunConfig, spark: SparkSession, directory: Path, last: Scoring | None
) -> DataFrame | None:
    """Read the scoring before this one, if it is wanted and there is one."""
    if last is not None:
        folder = last.directory.resolve() / last.destination
        return last_result(spark, folder if folder.is_dir() else last.destination)
    if not config.scoring.only_changed:
        return None
    return last_result(spark, config.scoring.table or directory / _RESULT)


def _query_columns(copy: Path) -> QueryColumns:
    return QueryColumns.of(read_contract(copy / "artifacts" / "exact"))


def _check(columns: Sequence[str], copy: Path, users: str) -> None:
    """Refuse a table that cannot tell who asks, and warn of columns that are not used."""
    known = _query_columns(copy)
    known.check(columns, users)
    if unknown := known.unknown(columns):
        logger.warning("%s has columns that the model does not know: %s", users, unknown)


def _content(table: DataFrame, users: str) -> tuple[int, str]:
    """Number of rows, and a text that changes with any of them: a sum of hashes, in any order."""
    total = F.sum(json_hash(table.columns).cast("decimal(38,0)"))
    row = table.agg(F.count("*").alias("rows"), total.alias("total")).collect()[0]
    return row["rows"], f"{users} {table.schema.simpleString()} {row['total']}"


def _listed(config: RunConfig) -> list[str] | None:
    file = config.scoring.unavailable
    return None if file is None else read_items(Path(file), _ITEM)


def _copy(model: ModelVersion, copy: Path, listed: Sequence[str] | None) -> None:
    """Download a version and tell it what is not available."""
    download(model, copy)
    if listed is None:
        return
    variants = sorted((copy / "artifacts").iterdir())
    for variant in variants:
        write_listing(variant, listed)
    # The other has the same items.
    found = compared(variants[0], listed, model.uri)
    logger.info("%d of %d items are not available", found.num_unavailable, found.num_items)
    if found.unknown:
        logger.warning(
            "%d listed ids are not in the corpus, such as %s", len(found.unknown), found.unknown[0]
        )


def _identity(model: ModelVersion) -> str:
    """Name a version by what made it: another registry may have the same name and number."""
    made_by = describe(model) | {"registry": mlflow.get_registry_uri()}
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]


def _suffix(listed: list[str] | None) -> str:
    """Workers keep a model that they have loaded from a folder: another list, another folder."""
    return "" if listed is None else f"-{_digest(listed)}"


def _digest(items: list[str]) -> str:
    return hashlib.sha256(listing(sorted(items)).encode()).hexdigest()[:16]


def _write_parts(
    table: DataFrame, parts: int, copy: Path, model: ModelVersion, k: int
) -> tuple[int, int]:
    """Score and write the parts that are not there; count the users of all, and who was kept."""
    result = copy.parent / _RESULT
    write = partial(_write_part, result=str(result), copy=str(copy), model=model, k=k)
    counts = table.repartition(parts, "user").mapInArrow(write, _COUNTS).collect()
    before = sum(row["found"] for row in counts)
    logger.info("scored %d parts; %d were there", len(counts) - before, before)
    return sum(row["num_users"] for row in counts), sum(row["num_kept"] for row in counts)


def _write_part(
    batches: Iterator[pa.RecordBatch], *, result: str, copy: str, model: ModelVersion, k: int
) -> Iterator[pa.RecordBatch]:
    """In a task: write its part, unless it is there; yield how many users it has."""
    context = TaskContext.get()
    assert context is not None
    part = context.partitionId()
    file = Path(result) / f"part-{part:05d}.parquet"
    found = file.is_file()
    if found:
        # Read what is not needed: Spark gives up a worker that stops in the middle, and its model.
        for _ in batches:
            pass
    else:
        # Another attempt at the same task may run at the same time; the last to finish stays.
        temporary = file.with_name(f".{file.name}.{context.taskAttemptId()}.{os.getpid()}")
        num_kept = 0
        with pq.ParquetWriter(temporary, _schema(number_lists(Path(copy)))) as writer:
            for batch in batches:
                kept, changed = _parted(batch)
                num_kept += kept.num_rows
                if kept.num_rows:
                    writer.write_batch(_rows(kept, kept[KEPT].flatten(), model))
                for answered in _answered(changed, copy, model, k):
                    writer.write_batch(answered)
            # In the file, so that a later attempt which finds it can tell.
            writer.add_key_value_metadata({_NUM_KEPT: str(num_kept)})
        temporary.replace(file)
    written = pq.read_metadata(file)
    counts = [part, written.num_rows, int(written.metadata[_NUM_KEPT.encode()]), found]
    types = (pa.int32(), pa.int64(), pa.int64(), pa.bool_())
    arrays = [pa.array([count], kind) for count, kind in zip(counts, types, strict=True)]
    yield pa.RecordBatch.from_arrays(arrays, ["part", "num_users", "num_kept", "found"])


def _parted(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Rows with an answer that is kept, and those to be scored."""
    if KEPT not in batch.schema.names:
        return batch.slice(0, 0), batch
    has_answer = batch[KEPT].is_valid()
    return batch.filter(has_answer), batch.filter(pc.invert(has_answer))


def _answered(
    batch: pa.RecordBatch, copy: str, model: ModelVersion, k: int
) -> Iterator[pa.RecordBatch]:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    # In pieces, so that few answers are held at once.
    for start in range(0, batch.num_rows, _ROWS):
        few = {name: column.slice(start, _ROWS) for name, column in columns.items()}
        answers = _scorer(copy).answer(few, len(few["user"]), k).flatten()
        yield _rows(batch.slice(start, _ROWS), answers, model)


def _rows(
    users: pa.RecordBatch, answers: Sequence[pa.Array], model: ModelVersion
) -> pa.RecordBatch:
    """The result: users with their items and scores."""
    versions = [pa.array([text] * users.num_rows) for text in (model.name, model.version)]
    # Lists that not every model gives stand last.
    columns = [users["user"], *answers[:2], *versions, users[HASH], *answers[2:]]
    schema = _schema(LISTS[1 : len(answers)])
    cast = [column.cast(kind) for column, kind in zip(columns, schema.types, strict=True)]
    return pa.RecordBatch.from_arrays(cast, schema=schema)


def _schema(numbers: Sequence[str]) -> pa.Schema:
    """Of a result whose lists of numbers are these."""
    texts, floats = pa.list_(pa.string()), pa.list_(pa.float32())
    types = (pa.string(), texts, floats, pa.string(), pa.string(), pa.int64())
    fields = list(zip(_COLUMNS, types, strict=True))
    return pa.schema(fields + [(name, floats) for name in numbers[1:]])


def _function(copy: str, asked: QueryColumns) -> Callable[..., pa.Array]:
    def recommend(*arguments: pa.Array) -> pa.Array:
        columns, k = asked.from_arguments(arguments)
        return _scorer(copy).answer(columns, len(arguments[-1]), k)

    return recommend


@lru_cache(maxsize=1)
def _scorer(copy: str) -> ArrowScorer:
    """Load the model once per Python worker; Spark keeps workers, and they keep one model.

    The folder's name has the identity of the version: no two models have been in one folder.
    Spark runs a task for each core, so TensorFlow gets one thread.
    """
    try:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:
        logger.debug("TensorFlow was in use before in this worker")
    return ArrowScorer(Path(copy))
