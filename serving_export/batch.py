"""Score a table of users with a registered model, in Spark."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from pyspark.sql import DataFrame, SparkSession

from recsys.artifacts import Scoring, replaced
from recsys.config import RunConfig
from serving_export.registry import CHAMPION, ModelVersion, download, resolve

logger = logging.getLogger(__name__)

_RESULT = "recommendations"
_SCHEMA = (
    "user string, items array<string>, scores array<float>, model string, model_version string"
)


def score(
    config: RunConfig, spark: SparkSession, users: str, directory: Path, model: str | None = None
) -> Scoring:
    """Recommend `scoring.k` items to every user.

    Writes one row per user (`user`, `items`, `scores`, `model`, `model_version`; lists are shorter
    than k where fewer items may be recommended) to the table `scoring.table`, or to Parquet in
    `directory`, which is replaced as a whole.

    Args:
        config: `registry.model`, `scoring`.
        spark: session; executors need this package, TensorFlow and MLflow, and read `directory`.
        users: folder of Parquet files, or a table: `user`, query features, maybe `exclusions`.
        directory: of the result, on a file system that driver and executors share.
        model: `name@alias` or `name/version`; the champion if not given. An alias is resolved
            once, so that all rows come from one version.

    Raises:
        ArtifactError: there is no such model, or no champion yet.
    """
    chosen = resolve(model or f"{config.registry.model}@{CHAMPION}")
    logger.info("scoring with %s", chosen.uri)
    with replaced(directory) as folder:
        copy = download(chosen, folder / "model")
        result = str(folder / _RESULT)
        _answers(spark, _read(spark, users), copy, chosen, config.scoring.k).write.parquet(result)
        num_users = spark.read.parquet(result).count()
        shutil.rmtree(copy)
        if config.scoring.table:
            written = spark.read.parquet(result)
            written.write.mode("overwrite").saveAsTable(config.scoring.table)
            shutil.rmtree(result)
        scoring = Scoring(
            directory=folder,
            destination=config.scoring.table or _RESULT,
            num_users=num_users,
            k=config.scoring.k,
            name=chosen.name,
            model_version=chosen.version,
        ).save()
    return scoring.model_copy(update={"directory": directory})


def _read(spark: SparkSession, users: str) -> DataFrame:
    is_path = "/" in users or Path(users).exists()
    return spark.read.parquet(users) if is_path else spark.table(users)


def _answers(
    spark: SparkSession, users: DataFrame, folder: Path, model: ModelVersion, k: int
) -> DataFrame:
    # Scoring is bound by the processor: a small file must not end up on one core.
    spread = users.repartition(spark.sparkContext.defaultParallelism)
    answer = partial(
        _answer, folder=str(folder.resolve()), name=model.name, version=model.version, k=k
    )
    return spread.mapInPandas(answer, _SCHEMA)


def _answer(
    frames: Iterator[pd.DataFrame], *, folder: str, name: str, version: str, k: int
) -> Iterator[pd.DataFrame]:
    recommender = _recommender(folder, name, version)
    for frame in frames:
        answer = recommender.predict(None, frame, {"k": k})
        yield pd.DataFrame(
            {
                "user": frame["user"],
                "items": answer["ids"],
                "scores": answer["scores"],
                "model": name,
                "model_version": version,
            }
        )


@cache
def _recommender(folder: str, name: str, version: str) -> Any:
    """Load the model once per Python worker; past MLflow's checks, which look at every cell.

    Name and version are keys of the cache: a later call finds another model in the same folder.
    """
    return mlflow.pyfunc.load_model(folder).unwrap_python_model()
