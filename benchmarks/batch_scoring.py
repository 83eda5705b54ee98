"""Batch scoring in Spark beside Spark's own ALS, users per second to their top k.

    python benchmarks/batch_scoring.py [--users 20000] [--items 100000] [--k 100] [--cores 1]
        [--peer-users 20000]

Both score users against the same number of items with vectors of the same length, in the same
Spark session, to Parquet, after one untimed run over a few users. ALS is trained for one iteration
on random ratings, for its speed does not depend on what it has learned; it may be asked for fewer
of its users, whom it takes block by block, so that its time grows with their number.
Ours is `serving_export.batch.score` with an exported model of random towers over clustered items:
it also embeds the queries, and its index is tuned to a recall@k of .95 against exact search.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
from mlflow import MlflowClient
from pyspark.ml.recommendation import ALS, ALSModel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from records import Record, write
from untrained import DIM, exported, histories, run_config

from recsys.artifacts import Estimate, EvaluationReport, ExportedModel
from recsys.config import RunConfig
from serving_export.batch import score
from serving_export.registry import connect, register
from training.session import spark_session

WARM_UP = 200
NAME = "batch_scoring"


def registered(config: RunConfig, folder: Path, num_items: int) -> ExportedModel:
    """Towers that nothing has trained, exported and registered as any other."""
    made = exported(config, folder, num_items)
    connect(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = mlflow.create_experiment(NAME, (folder / "artifacts").as_uri())
    run_id = MlflowClient().create_run(experiment).info.run_id
    zero = {config.registry.gate.metric: Estimate(value=0, low=0, high=0)}
    report = EvaluationReport(
        num_queries=0, num_candidates=num_items, window=(None, None), data_fingerprint="",
        model=zero, baselines={}, lifts={}, slices={}, per_query="",
    )  # fmt: skip
    register(config, made, report, run_id, folder / "registration")
    return made


def write_users(folder: Path, num_users: int, num_items: int) -> str:
    """Parquet of users and their histories."""
    folder.mkdir(parents=True)
    columns = {
        "user": [f"u{n}" for n in range(num_users)],
        "history": histories(num_users, num_items, 4),
    }
    pq.write_table(pa.table(columns), folder / "part-0.parquet")
    return str(folder)


def als(spark: SparkSession, num_users: int, num_items: int) -> ALSModel:
    """One iteration on ten random ratings a user; every item has one."""
    ratings = spark.range(max(10 * num_users, num_items)).select(
        (F.col("id") % num_users).cast("int").alias("user"),
        (F.pmod(F.xxhash64("id"), F.lit(num_items))).cast("int").alias("hashed"),
        F.when(F.col("id") < num_items, F.col("id")).cast("int").alias("own"),
    )
    ratings = ratings.withColumn("item", F.coalesce("own", "hashed")).withColumn(
        "rating", F.lit(1.0)
    )
    return ALS(rank=DIM, maxIter=1, implicitPrefs=True, userCol="user", itemCol="item").fit(ratings)


def timed(what: Callable[[], object]) -> float:
    """Wall seconds."""
    begun = time.monotonic()
    what()
    return time.monotonic() - begun


def main() -> None:
    """Score with both, twice in turn, and keep the better time of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--peer-users", type=int, help="that ALS scores (all)")
    arguments = parser.parse_args()
    os.environ["PYSPARK_PYTHON"] = sys.executable
    config = run_config(NAME, arguments.k, arguments.cores)
    with tempfile.TemporaryDirectory() as temporary:
        write("batch_scoring", list(_records(config, arguments, Path(temporary))))


def _records(config: RunConfig, sizes: argparse.Namespace, folder: Path) -> Iterator[Record]:
    made = registered(config, folder, sizes.items)
    spark = spark_session(config.cluster, NAME)
    users = write_users(folder / "users", sizes.users, sizes.items)
    few = write_users(folder / "few", WARM_UP, sizes.items)
    factors = als(spark, sizes.users, sizes.items)

    def ours(table: str) -> None:
        score(config, spark, table, folder / "scoring", f"{NAME}@challenger")

    def theirs(answers: DataFrame) -> None:
        answers.write.mode("overwrite").parquet(str(folder / "als"))

    known = factors.userFactors.select(F.col("id").alias("user"))
    peers = min(sizes.peer_users or sizes.users, sizes.users)
    ours(few)
    theirs(factors.recommendForUserSubset(known.limit(WARM_UP), sizes.k))
    asked = (
        factors.recommendForAllUsers(sizes.k)
        if peers == sizes.users
        else factors.recommendForUserSubset(known.limit(peers), sizes.k)
    )
    seconds: dict[str, list[float]] = {"ours": [], "als": []}
    for _ in range(2):
        seconds["ours"].append(timed(lambda: ours(users)))
        seconds["als"].append(timed(lambda: theirs(asked)))
        print(seconds, flush=True)
    spark.stop()
    load, cores = os.getloadavg()[0], os.cpu_count()
    data = f"{sizes.users} users x {sizes.items} items, vectors of {DIM}, top {sizes.k}"
    command = (
        f"python benchmarks/batch_scoring.py --users {sizes.users} --items {sizes.items} "
        f"--k {sizes.k} --cores {sizes.cores} --peer-users {peers}"
    )
    index = made.index
    yield Record(
        what=f"score, local[{sizes.cores}], {index.kind} index, recall@{index.k} "
        f"{index.recall:.4f}; load {load:.1f} on {cores} cores",
        data=data,
        metric="users/s, to Parquet",
        value=sizes.users / min(seconds["ours"]),
        command=command,
        peer=f"Spark ML ALS, recommendations for {peers} of its users",
        peer_value=peers / min(seconds["als"]),
        target="at least 10 times",
    )


if __name__ == "__main__":
    main()
