"""A tiny world: prepared data written by hand, towers that are looked up rather than trained."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import tensorflow as tf
from mlflow import MlflowClient

from recsys.artifacts import (
    Corpus,
    Estimate,
    EvaluationReport,
    Examples,
    ExportedModel,
    PreparedData,
    Sequences,
    Statistics,
    TrainedModel,
    VocabularyFile,
)
from recsys.config import RunConfig
from recsys.dataset import read_corpus
from recsys.features import raw_signature
from recsys.schema import Feature, Schema
from serving_export.index import Effort, ExactIndex, ScannIndex
from serving_export.registry import connect, register
from serving_export.retriever import Retriever
from serving_export.savedmodel import _write, export
from serving_export.searcher import Structure, train

DIM = 8
NUM_ITEMS = 60
FEATURES = (
    Feature(name="history", side="query", kind="history", of="item_id", length=5),
    Feature(name="member", side="query", kind="id", column="user"),
    Feature(name="country", side="context", kind="category"),
    Feature(name="basket", side="query", kind="number"),
    Feature(name="clicked_at", side="query", kind="time", column="time"),
    Feature(name="taste", side="query", kind="vector", dim=3),
    Feature(name="item_id", side="candidate", kind="id", column="item"),
    Feature(name="price", side="candidate", kind="number"),
)


def run_config(features=FEATURES, gate=None, scoring=None, **export_settings) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "data": {
                "events": {
                    "path": "clicks.csv",
                    "columns": {"user": "user", "item": "item", "time": "time"},
                },
                "split": {"kind": "leave_last_out"},
                "min_history": 1,
            },
            "features": [f.model_dump() for f in features],
            "export": {"index": {"k": 10, "min_recall": 0.9}, "parity_queries": 16}
            | export_settings,
            "registry": {"model": "tiny", "gate": gate or {"metric": "ndcg@10"}},
            "evaluation": {"k": [10], "bootstrap_samples": 50},
            "scoring": scoring or {},
        }
    )


def item(row: int) -> str:
    return f"Ærtikel {row:05d}"


def write_records(file: Path, rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(file)) as writer:
        for row in rows:
            writer.write(_example(row).SerializeToString())


def _example(row) -> tf.train.Example:
    features = {}
    for name, value in row.items():
        values = value if isinstance(value, list) else [value]
        if values and isinstance(values[0], float):
            features[name] = tf.train.Feature(float_list=tf.train.FloatList(value=values))
        elif values and isinstance(values[0], int):
            features[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        else:
            encoded = [v.encode() for v in values]
            features[name] = tf.train.Feature(bytes_list=tf.train.BytesList(value=encoded))
    return tf.train.Example(features=tf.train.Features(feature=features))


class Towers(tf.Module):
    """Lookups instead of training: an item is its vector, a query the sum of what it knows."""

    def __init__(self, data: PreparedData, seed: int) -> None:
        super().__init__()
        draw = np.random.default_rng(seed).normal
        size = {name: file.size + 1 for name, file in data.vocabularies.items()}
        self.vectors = {
            name: tf.Variable(draw(size=(rows, DIM)).astype(np.float32))
            for name, rows in size.items()
        }
        self.tables = {
            name: tf.lookup.StaticHashTable(
                tf.lookup.TextFileInitializer(
                    str(data.directory / file.path),
                    tf.string,
                    tf.lookup.TextFileIndex.WHOLE_LINE,
                    tf.int64,
                    tf.lookup.TextFileIndex.LINE_NUMBER,
                ),
                default_value=file.size,
            )
            for name, file in data.vocabularies.items()
        }

    def vector(self, name, values):
        return tf.gather(self.vectors[name], self.tables[name].lookup(values))

    def embed_query(self, **raw):
        present = tf.cast(raw["history"] != "", tf.float32)[..., tf.newaxis]
        total = tf.reduce_sum(self.vector("item_id", raw["history"]) * present, axis=1)
        basket = tf.where(tf.math.is_nan(raw["basket"]), 0.0, raw["basket"])
        total += self.vector("member", raw["member"]) + self.vector("country", raw["country"])
        taste = tf.pad(raw["taste"], [[0, 0], [0, DIM - 3]])
        return {"embedding": total + 0.01 * basket[:, tf.newaxis] + taste}

    def embed_candidate(self, **raw):
        return {"embedding": self.vector("item_id", raw["item_id"]) + 0.1 * raw["price"][:, None]}


def write_data(directory: Path, num_items: int = NUM_ITEMS, exclude_seen: bool = False):
    """Items that fall in popularity; the last ten are in no vocabulary."""
    known = num_items - 10
    random = np.random.default_rng(7)
    vocabularies = {
        "item_id": [item(row) for row in range(known)],
        "member": [f"user {n}" for n in range(6)],
        "country": ["dk", "de"],
    }
    for name, values in vocabularies.items():
        (directory / "vocabularies").mkdir(parents=True, exist_ok=True)
        (directory / f"vocabularies/{name}.txt").write_text("\n".join(values) + "\n")
    counts = [max(known - row, 0) for row in range(num_items)]
    write_records(
        directory / "corpus/part-00000.tfrecord",
        [
            {"item": item(r), "name": f"name {r}", "count": c, "labels": c, "item_id": item(r)}
            | {"price": r / num_items}
            for r, c in enumerate(counts)
        ],
    )
    write_records(
        directory / "test/part-00000.tfrecord",
        [
            {
                "user": f"user {n}",
                "label": item(n),
                "history": [item(r) for r in random.integers(0, num_items, n % 6)],
                "member": f"user {n}",
                "country": ["dk", "de", "fr"][n % 3],
                "basket": float(n),
            }
            | ({"taste": [0.5, -1.0, float(n % 5)]} if n % 4 else {})
            for n in range(40)
        ],
    )
    features = run_config().schema_
    empty = Examples(path="none", num_examples=0, num_files=0)
    unseen = Sequences(path="none", num_sequences=0, num_examples=0, num_files=0)
    return PreparedData(
        directory=directory,
        features=features,
        fingerprint=features.fingerprint,
        train=unseen,
        recent=unseen,
        validation=empty,
        test=Examples(path="test", num_examples=40, num_files=1),
        corpus=Corpus(path="corpus", num_items=num_items, num_warm=known),
        users="users",
        num_users=0,
        vocabularies={
            name: VocabularyFile(path=f"vocabularies/{name}.txt", size=len(values), oov=1)
            for name, values in vocabularies.items()
        },
        statistics={"basket": Statistics(mean=0, std=1), "price": Statistics(mean=0, std=1)},
        cleaning={},
        sources={},
        exclude_seen=exclude_seen,
    ).save()


class Clicks(Towers):
    """Queries of a user's id and what was clicked, maybe with the kind of each click."""

    def embed_query(self, **raw):
        present = tf.cast(raw["history"] != "", tf.float32)[..., tf.newaxis]
        clicked = self.vector("item_id", raw["history"])
        if "event_history" in raw:
            clicked += self.vector("event", raw["event_history"])
        total = tf.reduce_sum(clicked * present, axis=1)
        return {"embedding": total + self.vector("user_id", raw["user_id"])}


def write_version(directory: Path, events: bool = False) -> Path:
    """A version as it is downloaded: users with histories, and ScaNN's variant a small tree.

    With `events` they have a second history, of the kinds of events, and both variants are exact.
    """
    query = [
        Feature(name="user_id", side="query", kind="id", column="user"),
        Feature(name="history", side="query", kind="history", of="item_id", length=5),
    ]
    if events:
        query += [
            Feature(name="event_history", side="query", kind="history", of="event", length=5),
            Feature(name="event", side="context", kind="category"),
        ]
    features = Schema(features=(*query, *(f for f in FEATURES if f.side == "candidate")))
    data = write_data(directory / "data", num_items=400)
    known = dict(zip(("item_id", "user_id", "event"), data.vocabularies.values(), strict=True))
    data = data.model_copy(update={"features": features, "vocabularies": known})
    towers = tf.saved_model.load(
        str(write_model(data, directory / "model", 3, Clicks).directory / "towers")
    )
    corpus = read_corpus(data)
    candidates = {name: tf.constant(values) for name, values in corpus.features.items()}
    embeddings = towers.signatures["embed_candidate"](**candidates)["embedding"].numpy()
    # Some leaves hold fewer than k, so that all are searched for some queries.
    effort = Effort(k=10, num_leaves=20, leaves_to_search=1, reorder=12)
    exact = ExactIndex(embeddings)
    tree = (
        exact if events else ScannIndex(train(embeddings, Structure("tree", 20, 2.0)), 400, effort)
    )
    contract = {"features": features.model_dump(mode="json")["features"]}
    for name, index in (("exact", exact), ("scann", tree)):
        _write(Retriever(towers, index, corpus, data), directory / "artifacts" / name, contract)
    shutil.rmtree(directory / "data")
    shutil.rmtree(directory / "model")
    return directory


def write_model(data: PreparedData, directory: Path, seed: int = 3, kind=Towers) -> TrainedModel:
    towers = kind(data, seed)
    signatures = {
        name: tf.function(embed).get_concrete_function(**raw_signature(features))
        for name, embed, features in (
            ("embed_query", towers.embed_query, data.features.query),
            ("embed_candidate", towers.embed_candidate, data.features.candidate),
        )
    }
    tf.saved_model.save(towers, str(directory / "towers"), signatures=signatures)
    return TrainedModel(
        directory=directory,
        towers="towers",
        features=data.features,
        embedding_dim=DIM,
        best_epoch=1,
        monitor="ndcg@20",
        curves={},
        mlflow_run_id=None,
        versions={},
    ).save()


def ask(model, histories, k=5, exclusions=None, member=None, basket=None, taste=None):
    """Call `recommend` with the histories given; every other feature is missing."""
    batch = len(histories)
    width = max([len(h) for h in histories], default=0)
    exclusions = exclusions or [[] for _ in histories]
    most = max([len(e) for e in exclusions], default=0)
    answer = model.signatures["recommend"](
        history=_dense(histories, width),
        member=tf.constant(member or [""] * batch, tf.string),
        country=tf.constant([""] * batch, tf.string),
        basket=tf.constant(basket or [float("nan")] * batch, tf.float32),
        clicked_at=tf.constant([-1] * batch, tf.int64),
        taste=tf.constant(taste or [[0.0] * 3] * batch, tf.float32, [batch, 3]),
        k=tf.constant(k),
        exclusions=_dense(exclusions, most),
    )
    ids = [[i.decode() for i in row] for row in answer["ids"].numpy()]
    return ids, answer["scores"].numpy()


def _dense(lists, width):
    padded = [list(values) + [""] * (width - len(values)) for values in lists]
    return tf.reshape(tf.constant(padded, tf.string), [len(lists), width])


def write_report(
    directory: Path, ranks, lifts, fingerprint="same data", splits=None, margin=0.04
) -> EvaluationReport:
    """An evaluation of one query per rank, or as `splits` says; `lifts` of ndcg@10 by baseline."""
    directory.mkdir(parents=True, exist_ok=True)
    queries = np.arange(len(ranks) if splits is None else len(splits) - 1)
    labels = np.arange(len(ranks))
    arrays = {"user": queries // 2, "label": labels, "rank_model": np.asarray(ranks)}
    arrays |= {} if splits is None else {"splits": np.asarray(splits)}
    np.savez(directory / "per_query.npz", **arrays)
    estimates = {
        name: {"ndcg@10": Estimate(value=lift, low=lift - margin, high=lift + margin)}
        for name, lift in lifts.items()
    }
    return EvaluationReport(
        directory=directory,
        num_queries=len(ranks),
        num_candidates=NUM_ITEMS,
        window=(None, None),
        data_fingerprint=fingerprint,
        model={"ndcg@10": Estimate(value=0.25, low=0.2, high=0.3)},
        baselines={name: {} for name in lifts},
        lifts=estimates,
        slices={},
        per_query="per_query.npz",
    ).save()


def clustered(rows: int, seed: int, clusters: int = 100, dim: int = 16, spread: float = 0.3):
    """Vectors around centres that every seed shares, of lengths that differ."""
    centres = np.random.default_rng(0).normal(size=(clusters, dim))
    random = np.random.default_rng(seed)
    points = centres[random.integers(0, clusters, rows)] + 0.5 * random.normal(size=(rows, dim))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return (points * np.exp(spread * random.normal(size=(rows, 1)))).astype(np.float32)


def exact_rows(embeddings, queries, k):
    """Rows of the exact top k, best first."""
    return np.argsort(-(queries @ embeddings.T), axis=1, kind="stable")[:, :k]


@pytest.fixture(scope="session")
def tiny():
    """The makers of this file, which tests cannot import."""
    return SimpleNamespace(
        ask=ask,
        clustered=clustered,
        exact_rows=exact_rows,
        item=item,
        num_items=NUM_ITEMS,
        run_config=run_config,
        write_data=write_data,
        write_model=write_model,
        write_report=write_report,
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Exported once; then the folders it was made from are deleted and the export is moved."""
    root = tmp_path_factory.mktemp("world")
    config, data = run_config(availability=True), write_data(root / "data")
    model = write_model(data, root / "model")
    export(config, data, model, root / "made" / "export")
    (root / "moved").mkdir()
    (root / "made" / "export").rename(root / "moved" / "export")
    for folder in ("data", "model", "made"):
        shutil.rmtree(root / folder)
    exported = ExportedModel.load(root / "moved" / "export")
    models = {
        name: tf.saved_model.load(str(exported.directory / path))
        for name, path in exported.variants.items()
    }
    return SimpleNamespace(config=config, exported=exported, models=models)


@pytest.fixture(scope="session")
def variants(world):
    """Folders of the world's SavedModels by variant."""
    return {name: world.exported.directory / path for name, path in world.exported.variants.items()}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Prepared data like the world's, to ask its models with."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A version that knows users and their histories, on a tree; see `write_version`."""
    return write_version(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="session")
def shop_of_events(tmp_path_factory):
    """A version with two histories, see `write_version`."""
    return write_version(tmp_path_factory.mktemp("shop_of_events"), events=True)


@pytest.fixture(scope="session")
def registry(world, tmp_path_factory):
    """MLflow on SQLite with the world's export as its first version."""
    root = tmp_path_factory.mktemp("registry")
    connect(f"sqlite:///{root / 'mlflow.db'}")
    experiment = mlflow.create_experiment("tiny", (root / "artifacts").as_uri())
    run_id = MlflowClient().create_run(experiment).info.run_id
    report = write_report(root / "evaluation", [1, 2, 0, 4], {"popularity": 0.5, "als": -0.5})
    registered = register(world.config, world.exported, report, run_id, root / "registration")
    return SimpleNamespace(
        uri=mlflow.get_tracking_uri(), run_id=run_id, report=report, registered=registered
    )


@contextmanager
def answering(root, port, health, command, environment=None):
    """Start a server of MLflow's and stop it in the end, with all its processes."""
    command = [Path(sys.executable).with_name("mlflow"), *command, "--port", port]
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=log,
            stderr=log,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}/{health}", process, root / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def wait_until_it_answers(url, process, log, patience=240):
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"{url} does not answer:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory):
    """Address of a real `mlflow server` with a database, which stores artifacts for its clients."""
    root = tmp_path_factory.mktemp("server")
    command = ["server", "--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}"]
    command += ["--artifacts-destination", root / "artifacts", "--workers", 1]
    # It schedules jobs of its own, each in a further process.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with answering(root, free_port(), "health", command, environment) as address:
        yield address


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """Serve a registered model as `mlflow models serve` does, in the environment at hand."""

    def serve(tracking_uri, model):
        command = ["models", "serve", "-m", model, "--env-manager", "local"]
        # MLflow looks for `uvicorn` on the path, as in an environment that was activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {"MLFLOW_TRACKING_URI": tracking_uri, "PATH": path}
        root = tmp_path_factory.mktemp("served")
        return answering(root, free_port(), "ping", command, environment)

    return serve
