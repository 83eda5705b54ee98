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
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf
from mlflow import MlflowClient
from pyspark.ml.recommendation import ALS, ALSModel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from records import Record, write

from recsys.artifacts import (
    Corpus,
    Estimate,
    EvaluationReport,
    Examples,
    ExportedModel,
    PreparedData,
    Sequences,
    TrainedModel,
    VocabularyFile,
)
from recsys.config import RunConfig
from recsys.features import raw_signature
from serving_export.batch import score
from serving_export.registry import connect, register
from serving_export.savedmodel import export
from training.session import spark_session

DIM = 64
HISTORY = 10
CLUSTERS = 500
WARM_UP = 200
NAME = "batch_scoring"


def run_config(k: int, cores: int) -> RunConfig:
    """Items by id, users by their history; nothing else."""
    item = {"side": "candidate", "kind": "id", "column": "item"}
    history = {"side": "query", "kind": "history", "of": "item_id", "length": HISTORY}
    columns = {"user": "user", "item": "item", "time": "time"}
    return RunConfig.model_validate(
        {
            "name": NAME,
            "data": {
                "events": {"path": "none.csv", "columns": columns},
                "split": {"kind": "leave_last_out"},
                "min_history": 1,
            },
            "features": [{"name": "history"} | history, {"name": "item_id"} | item],
            "evaluation": {"k": [k]},
            "export": {"index": {"k": k, "max_seconds": 60}, "parity_queries": 32},
            "registry": {"model": NAME, "gate": {"metric": f"ndcg@{k}"}},
            "scoring": {"k": k},
            "cluster": {"master": f"local[{cores}]"},
        }
    )


class Towers(tf.Module):
    """An item is a vector of its cluster, a query the mean of its history."""

    def __init__(self, vocabulary: Path, num_items: int) -> None:
        super().__init__()
        random = np.random.default_rng(1)
        centres = random.standard_normal((CLUSTERS, DIM), np.float32)
        items = centres[random.integers(0, CLUSTERS, num_items)]
        items += np.float32(0.6) * random.standard_normal(items.shape, np.float32)
        items *= np.exp(np.float32(0.3) * random.standard_normal((num_items, 1), np.float32)) / 8
        self.vectors = tf.Variable(np.concatenate([items, np.zeros([1, DIM], np.float32)]))
        lines = tf.lookup.TextFileInitializer(
            str(vocabulary), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER,
        )  # fmt: skip
        self.rows = tf.lookup.StaticHashTable(lines, default_value=num_items)

    def embed_query(self, history: tf.Tensor) -> dict[str, tf.Tensor]:
        """Mean of the items."""
        vectors = tf.gather(self.vectors, self.rows.lookup(history))
        return {"embedding": tf.reduce_mean(vectors, axis=1)}

    def embed_candidate(self, item_id: tf.Tensor) -> dict[str, tf.Tensor]:
        """Vector of the item."""
        return {"embedding": tf.gather(self.vectors, self.rows.lookup(item_id))}


def histories(num_queries: int, num_items: int, seed: int) -> list[list[str]]:
    """Random histories, as item ids."""
    rows = np.random.default_rng(seed).integers(0, num_items, (num_queries, HISTORY))
    return [[f"i{row}" for row in each] for each in rows.tolist()]


def prepared(config: RunConfig, folder: Path, num_items: int) -> PreparedData:
    """A corpus, its vocabulary and test queries, written by hand."""
    for name in ("corpus", "test"):
        (folder / name).mkdir(parents=True)
    items = [f"i{row}" for row in range(num_items)]
    (folder / "items.txt").write_text("\n".join(items) + "\n")
    with tf.io.TFRecordWriter(str(folder / "corpus" / "part-0")) as writer:
        for item in items:
            writer.write(_example(item=[item], name=[item], item_id=[item], count=[1], labels=[1]))
    with tf.io.TFRecordWriter(str(folder / "test" / "part-0")) as writer:
        for history in histories(1000, num_items, 3):
            writer.write(_example(user=["u"], label=["i0"], history=history))
    nothing = Examples(path="none", num_examples=0, num_files=0)
    sequences = Sequences(path="none", num_sequences=0, num_examples=0, num_files=0)
    return PreparedData(
        directory=folder,
        features=config.schema_,
        fingerprint=config.schema_.fingerprint,
        train=sequences,
        recent=sequences,
        validation=nothing,
        test=Examples(path="test", num_examples=1000, num_files=1),
        corpus=Corpus(path="corpus", num_items=num_items, num_warm=num_items),
        users="users",
        num_users=0,
        vocabularies={"item_id": VocabularyFile(path="items.txt", size=num_items, oov=1)},
        statistics={},
        cleaning={},
        sources={},
        exclude_seen=False,
    ).save()


def _example(**columns: list[str] | list[int]) -> bytes:
    features = {
        name: tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        if isinstance(values[0], int)
        else tf.train.Feature(bytes_list=tf.train.BytesList(value=[v.encode() for v in values]))
        for name, values in columns.items()
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def exported(config: RunConfig, folder: Path, num_items: int) -> ExportedModel:
    """Towers that nothing has trained, exported and registered as any other."""
    data = prepared(config, folder / "data", num_items)
    towers = Towers(data.directory / "items.txt", num_items)
    signatures = {
        name: tf.function(embed).get_concrete_function(**raw_signature(features))
        for name, embed, features in (
            ("embed_query", towers.embed_query, data.features.query),
            ("embed_candidate", towers.embed_candidate, data.features.candidate),
        )
    }
    tf.saved_model.save(towers, str(folder / "model" / "towers"), signatures=signatures)
    model = TrainedModel(
        directory=folder / "model", towers="towers", features=data.features, embedding_dim=DIM,
        best_epoch=1, monitor="", curves={}, mlflow_run_id=None, versions={},
    )  # fmt: skip
    made = export(config, data, model, folder / "export")
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
    config = run_config(arguments.k, arguments.cores)
    with tempfile.TemporaryDirectory() as temporary:
        write("batch_scoring", list(_records(config, arguments, Path(temporary))))


def _records(config: RunConfig, sizes: argparse.Namespace, folder: Path) -> Iterator[Record]:
    made = exported(config, folder, sizes.items)
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
