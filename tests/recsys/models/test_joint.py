"""The contract of a joint training: both tasks move the towers, and each alone is itself."""

import numpy as np
import pytest
import tensorflow as tf

from recsys.binary_metrics import auc
from recsys.dataset import read_corpus
from recsys.features import FeatureEncoder
from recsys.model_config import TwoTowerConfig
from recsys.models.joint import JointTwoTower
from recsys.models.retrieval import TwoTower
from recsys.sequences import Order, training_batches

LOSSES = {
    "full": {"full_softmax_up_to": 1000},
    "mixed": {"full_softmax_up_to": 0, "num_uniform_negatives": 30, "num_popular_negatives": 10},
}
PER_EVENT = ("user_id", "clicked", "sequence", "known", "row")


@pytest.fixture(scope="module")
def corpus(prepared):
    return read_corpus(prepared)


@pytest.fixture(scope="module")
def encoder(prepared):
    return FeatureEncoder(prepared)


@pytest.fixture(scope="module")
def batches(prepared, corpus, encoder):
    """Labels, which are judged too: positive where the item is of an even row."""
    rows = corpus.rows()

    def encode(raw):
        row = rows.lookup(raw.pop("label"))
        batch = encoder(raw) | {"row": row, "pool": rows.lookup(raw["pool"])}
        outcome = tf.cast(row % 2 == 0, tf.float32)
        own = {name: batch[name] for name in PER_EVENT}
        told = {"outcome": outcome, "weight": tf.ones_like(outcome), "total": tf.size(row)}
        return batch | {"judged": own | told}

    order = Order(range(1), 1, 5000)
    return list(training_batches(prepared, [prepared.train], 24, order).map(encode))


@pytest.fixture
def build(prepared, corpus, encoder):
    def make(joint=None, loss="full", **settings):
        tf.keras.utils.set_random_seed(1)
        told = {"embedding_dim": 16, "dropout": 0.0, "hidden": [8], "history": {"kind": "mean"}}
        if joint is not None:
            told["joint"] = {"positive": ["like"], "hidden": [16], "dropout": 0.0} | joint
        config = TwoTowerConfig.model_validate(told | {"loss": LOSSES[loss]} | settings)
        kind = TwoTower if joint is None else JointTwoTower
        model = kind(config, prepared.features, encoder, corpus, 1)
        model.compile(optimizer=tf.keras.optimizers.Adam(0.02))
        return model

    return make


def test_every_variable_of_towers_and_head_moves_in_one_step(build, batches):
    model = build({"weight": 1.0}, share_item_embeddings=False)
    model.train_step(batches[0])
    before = [variable.numpy() for variable in model.trainable_variables]
    logs = {name: float(value) for name, value in model.train_step(batches[0]).items()}
    still = [
        variable.name
        for variable, old in zip(model.trainable_variables, before, strict=True)
        if np.array_equal(variable.numpy(), old)
    ]
    assert len(model.head.trainable_variables) == 4
    assert {v.ref() for v in model.head.trainable_variables} <= {
        v.ref() for v in model.trainable_variables
    }
    assert not still
    assert logs["loss"] == pytest.approx(logs["retrieval_loss"] + logs["ranking_loss"], rel=1e-5)


def test_the_ranking_alone_moves_both_towers(build, batches):
    model = build({"retrieval_weight": 0.0, "weight": 1.0}, share_item_embeddings=False)
    model.train_step(batches[0])
    before = {variable.ref(): variable.numpy() for variable in model.trainable_variables}
    model.train_step(batches[0])
    for tower in (model.query_tower, model.candidate_tower):
        moved = [not np.array_equal(v.numpy(), before[v.ref()]) for v in tower.trainable_variables]
        assert any(moved)


def test_without_weight_the_head_leaves_the_towers_as_they_are_without_it(build, batches):
    """Masks and draws of negatives included."""
    settings = {"dropout": 0.3, "id_dropout": 0.2, "candidate_dropout": 0.1}
    losses, items = [], []
    for joint in (None, {"weight": 0.0}):
        model = build(joint, "mixed", **settings)
        losses.append([float(model.train_step(batch)["loss"]) for batch in batches[:3]])
        items.append(model.embed_corpus().numpy())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    np.testing.assert_allclose(*items, atol=1e-5)


def test_planted_outcomes_are_learned_beside_the_retrieval(build, batches):
    model = build({"weight": 1.0})
    # One shape, so that the step is traced once.
    batch = batches[0]
    outcome = batch["judged"]["outcome"].numpy()
    before = auc(outcome, model.log_odds(batch).numpy())
    step = tf.function(model.train_step)
    losses = [float(step(batch)["retrieval_loss"])]
    for _ in range(25):
        step(batch)
    model.reset_metrics()
    losses.append(float(step(batch)["retrieval_loss"]))
    assert before < 0.75
    assert auc(outcome, model.log_odds(batch).numpy()) > 0.98
    assert losses[1] < 0.8 * losses[0]


def test_losses_of_replicas_add_up_to_that_of_one(build, batches):
    """Each has its own sequences; one has none."""
    model = build({"weight": 1.0})
    batch, judged = batches[0], batches[0]["judged"]
    whole = model.compute_loss(batch)
    parts = []
    for mask in (batch["sequence"] < 5, batch["sequence"] >= 5, batch["sequence"] < 0):
        own = {n: tf.boolean_mask(judged[n], mask) for n in (*PER_EVENT, "outcome", "weight")}
        labels = {n: tf.boolean_mask(batch[n], mask) for n in (*PER_EVENT, "weight", "place")}
        own["total"] = judged["total"]
        parts.append(model.compute_loss(batch | labels | {"judged": own}))
    assert float(tf.add_n(parts)) == pytest.approx(float(whole), rel=1e-5)
    # A batch may have judged events alone.
    alone = labels | {"pool": batch["pool"][:0], "judged": judged}
    assert 0 < float(model.compute_loss(batch | alone)) < float(whole)
    # Where replicas read different files they ask each other.
    asked = {name: value for name, value in judged.items() if name != "total"}
    assert float(model.compute_loss(batch | {"judged": asked})) == pytest.approx(float(whole))


def test_a_weight_counts_and_events_of_weight_zero_do_not(build, batches):
    model = build({"retrieval_weight": 0.0, "weight": 1.0})
    batch = batches[0]
    half = batch["judged"] | {"weight": batch["judged"]["weight"] / 2}
    none = batch["judged"] | {"weight": batch["judged"]["weight"] * 0}
    whole = float(model.compute_loss(batch))
    assert float(model.compute_loss(batch | {"judged": half})) == pytest.approx(whole / 2)
    assert float(model.compute_loss(batch | {"judged": none})) == 0


def test_the_saved_head_answers_like_the_model(build, batches, tmp_path):
    model = build({"weight": 1.0})
    model.train_step(batches[0])
    queries = model.embed_queries(
        {n: v[:2] for n, v in batches[0].items() if n in ("history", "user_id", "clicked")}
    )["embedding"]
    items = model.embed_corpus()[:5]
    model.towers.save(tmp_path / "towers")
    loaded = tf.saved_model.load(str(tmp_path / "towers"))
    candidates = tf.stack([items, items])
    answer = loaded.signatures["log_odds"](queries=queries, candidates=candidates)["log_odds"]
    expected = [model.head(tf.stack([query] * 5), items) for query in queries]
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-6)
