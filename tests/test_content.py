"""What items are about: a pretrained text encoder and given vectors, from tables to an answer."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from recsys.config import load_config
from recsys.dataset import read_corpus
from recsys.features import FeatureEncoder
from recsys.models.embed import embed, in_batches, load_towers
from recsys.models.retrieval import TwoTower
from recsys.sequences import Order, training_batches
from recsys.synthetic import clickstream
from serving_export.savedmodel import export
from training.fit import fit
from training.prepare import prepare

DIM = 4
NUM_ITEMS, NUM_CLUSTERS = 60, 6
YAML = """
name: content
data:
  events: {path: clicks.parquet, columns: {user: user, item: item, time: clicked_at}}
  items: {path: items.parquet, key: item}
  users:
    path: users.csv
    format: csv
    options: {header: "true", quote: "'"}
    key: user
    derive: {taste: "from_json(taste, 'array<float>')"}
  split: {kind: time, validation_days: 3, test_days: 3}
  history_scope: session
  min_history: 1
  shards: 1
features:
  - {name: history, side: query, kind: history, of: item_id, length: 5}
  - {name: taste, side: query, kind: vector, table: users, dim: 2}
  - {name: item_id, side: candidate, kind: id, column: item}
  - {name: title, side: candidate, kind: text, encoder: encoder}
  - {name: words, side: candidate, kind: text, column: title, ngrams: 2, length: 3, dim: 4}
  - {name: image, side: candidate, kind: vector, dim: 4}
model: {embedding_dim: 16, dropout: 0, id_dropout: 0.3}
train: {epochs: 3, global_batch_size: 16, learning_rate: 0.03}
export: {index: {k: 10}, parity_queries: 16}
evaluation: {k: [20]}
registry: {model: content}
"""
ANSWER = """
import sys, json, tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
found = model.signatures["embed_candidate"](
    item_id=tf.constant(["new", "new"]),
    title=tf.constant(json.loads(sys.argv[2])),
    words=tf.constant(["", ""]),
    image=tf.zeros([2, 4]),
)["embedding"].numpy()
print(json.dumps(found.tolist()))
assert not {"recsys", "training", "serving_export"} & set(sys.modules)
"""


def twin(item):
    return f"cold{item}"


@pytest.fixture(scope="module")
def config(tmp_path_factory, save_encoder):
    """Clicks on items whose title and image tell the cluster; `cold<n>` looks like item n."""
    folder = tmp_path_factory.mktemp("content")
    clicks = clickstream(num_sessions=500, num_items=NUM_ITEMS, seed=3)
    events = {"user": clicks.user, "item": [f"i{i}" for i in clicks.item]}
    frame = pd.DataFrame(events | {"clicked_at": clicks.clicked_at})
    frame["user"] = "u" + frame["user"].astype(str)
    # Timestamps of nanoseconds are none that Spark reads.
    frame["clicked_at"] = frame["clicked_at"].astype("datetime64[us, UTC]")
    frame.to_parquet(folder / "clicks.parquet")
    images = 3 * np.random.default_rng(5).normal(size=(NUM_CLUSTERS, DIM))
    rows = []
    for item in range(NUM_ITEMS):
        cluster = clicks.cluster[item]
        content = {"title": f"Word{cluster} of {item % 3}", "image": list(images[cluster])}
        rows += [{"item": f"i{item}"} | content, {"item": twin(item)} | content]
    rows += [{"item": "blank", "title": None, "image": None}]
    pd.DataFrame(rows).to_parquet(folder / "items.parquet")
    (folder / "users.csv").write_text("user,taste\nu1,'[1, 2]'\nu2,\n")
    vectors = np.random.default_rng(4).normal(size=(NUM_CLUSTERS, DIM)).astype(np.float32)
    words = [f"Word{cluster}" for cluster in range(NUM_CLUSTERS)]
    save_encoder(folder / "encoder", words, vectors)
    (folder / "content.yaml").write_text(YAML)
    return load_config(folder / "content.yaml")


@pytest.fixture(scope="module")
def data(config, spark, tmp_path_factory):
    return prepare(config, spark, tmp_path_factory.mktemp("run") / "data")


@pytest.fixture(scope="module")
def model(config, data):
    return fit(config, data, data.directory.with_name("model"))


@pytest.fixture(scope="module")
def embedded(model, data):
    corpus = read_corpus(data)
    towers = load_towers(model.directory / model.towers)
    vectors = embed(towers, "embed_candidate", in_batches(corpus.features))["embedding"]
    return dict(zip(corpus.item.astype(str), vectors, strict=True))


def test_records_hold_vectors_and_missing_ones_are_zeros(data, config):
    corpus = read_corpus(data)
    images = dict(zip(corpus.item.astype(str), corpus.features["image"], strict=True))
    given = pd.read_parquet(config.data.items.path).set_index("item")["image"]
    assert images["blank"].tolist() == [0] * DIM
    np.testing.assert_allclose(images["i7"], given["i7"], rtol=1e-6)
    batch = next(iter(training_batches(data, [data.train], 10_000, Order(range(1), 1, 10_000))))
    assert {tuple(taste) for taste in batch["taste"].numpy().tolist()} == {(0, 0), (1, 2)}
    users = pd.read_parquet(data.directory / data.users).set_index("user")["taste"]
    assert users["u1"].tolist() == [1, 2]
    assert users["u2"] is None


def test_an_item_without_clicks_lies_near_its_twin(embedded):
    """Nearer than nine in ten of the items of other clusters."""
    warm = [n for n in range(NUM_ITEMS) if f"i{n}" in embedded]
    nearer = []
    for item in warm:
        cold = embedded[twin(item)]
        others = [n for n in warm if (n - item) % NUM_CLUSTERS]
        strange = [cold @ embedded[f"i{n}"] for n in others]
        nearer.append(np.mean(cold @ embedded[f"i{item}"] > np.array(strange)))
    assert np.mean(nearer) > 0.9


@pytest.mark.parametrize("alone", ["title", "image"])
def test_a_given_vector_alone_tells_the_cluster(data, model, embedded, alone):
    """An item of which nothing else is known lies nearer to its own cluster than to the others."""
    corpus = read_corpus(data)
    rows = [list(corpus.item.astype(str)).index(twin(n)) for n in range(NUM_CLUSTERS)]
    features = {name: values[rows] for name, values in corpus.features.items()}
    unknown = {"title": np.full(NUM_CLUSTERS, b"", object), "image": np.zeros([NUM_CLUSTERS, DIM])}
    unknown["words"] = unknown["title"]
    features |= {n: v.astype(features[n].dtype) for n, v in unknown.items() if n != alone}
    towers = load_towers(model.directory / model.towers)
    found = embed(towers, "embed_candidate", in_batches(features))["embedding"]
    centres = [
        np.mean([embedded[f"i{n}"] for n in range(c, NUM_ITEMS, NUM_CLUSTERS)], axis=0)
        for c in range(NUM_CLUSTERS)
    ]
    similarity = found @ np.transpose(centres)
    own = np.diag(similarity)
    others = (similarity.sum(axis=1) - own) / (NUM_CLUSTERS - 1)
    assert np.mean(own > others) > 0.8
    assert own.mean() > others.mean() + 0.1


def test_the_encoder_is_frozen_and_in_no_checkpoint(config, data, model):
    assert not [name for name in _checkpointed(model) if "pretrained" in name.lower()]
    before = tf.saved_model.load(config.schema_["title"].encoder)._vectors.numpy()
    towers = tf.saved_model.load(str(model.directory / model.towers))
    after = towers._encoder._pretrained["title"]._model._vectors.numpy()
    np.testing.assert_array_equal(before, after)


def _checkpointed(model):
    newest = max((model.directory / "checkpoints").glob("epoch-*"))
    return [name for name, _ in tf.train.list_variables(str(newest / "weights"))]


def test_the_corpus_is_encoded_once_and_not_by_the_step(config, data, monkeypatch):
    encoder = FeatureEncoder(data)
    model = TwoTower(config.model, config.schema_, encoder, read_corpus(data), seed=1)
    assert model._corpus.features["title"].shape == (data.corpus.num_items, DIM)
    monkeypatch.setattr(encoder, "_pretrained", {})
    assert model.embed_corpus().shape == (data.corpus.num_items, 16)
    assert not [v for v in model.trainable_variables if v.shape == (NUM_CLUSTERS + 1, DIM)]


def test_raw_text_is_answered_by_a_fresh_process(config, data, model, tmp_path):
    exported = export(config, data, model, tmp_path / "export")
    assert exported.parity["exact"] == 1.0
    towers = load_towers(model.directory / model.towers)
    features = {
        "item_id": np.array([b"new", b"new"], object),
        "title": np.array([b"Word1 dress", b""], object),
        "words": np.array([b"", b""], object),
        "image": np.zeros([2, DIM], np.float32),
    }
    expected = embed(towers, "embed_candidate", in_batches(features))["embedding"]
    encoder = tmp_path.parent / "hidden"
    shutil.move(config.schema_["title"].encoder, encoder)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", ANSWER, str(tmp_path / "export" / "exact"), '["Word1 dress", ""]'],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
    finally:
        shutil.move(encoder, config.schema_["title"].encoder)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.array(json.loads(done.stdout.splitlines()[-1]))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.allclose(found[0], found[1], atol=0.05)
