import numpy as np
import pytest
import tensorflow as tf

from recsys.calibration import Calibration
from recsys.dataset import read_corpus
from recsys.features import FeatureEncoder
from recsys.models.multitask import Gate, Multitask, TaskWeights
from recsys.models.ranker_features import KnownItems
from recsys.ranking_config import Ranking

WIDTH = 5
KINDS = ["shared_bottom", "mmoe", "ple"]
SMALL = {
    "dropout": 0.0,
    "attention_dim": 8,
    "hidden": (16, 8),
    "tasks": {"buy": 1.0, "cart": 1.0},
}


@pytest.fixture(scope="module")
def build(prepared):
    corpus = read_corpus(prepared)
    random = np.random.default_rng(1)
    items = KnownItems(
        corpus,
        random.normal(size=(len(corpus), 4)).astype(np.float32),
        random.normal(size=(len(corpus), 2)).astype(np.float32),
    )

    encoder = FeatureEncoder(prepared)

    def make(kind, **settings):
        tf.keras.utils.set_random_seed(1)
        multitask = {"kind": kind, "experts": 2, "tower": [4]} | settings.pop("multitask", {})
        config = Ranking.model_validate(SMALL | settings | {"multitask": multitask})
        prior = np.full(len(config.tasks), -1.0)
        ranker = Multitask(config, prepared.features, encoder, items, 1, prior)
        ranker.compile(optimizer=tf.keras.optimizers.Adam(0.02))
        return ranker, requests(corpus)

    return make


def requests(corpus, n=24):
    """What was seen last is bought; what was seen before it is put into the cart."""
    random = np.random.default_rng(2)
    items = np.stack([random.choice(len(corpus), WIDTH, replace=False) for _ in range(n)])
    bought, carted = (random.integers(0, WIDTH, n) for _ in range(2))
    every = np.arange(n)
    history = [corpus.item[items[every, carted]], corpus.item[items[every, bought]], [b""] * n]
    labels = np.stack([np.eye(WIDTH)[bought], np.eye(WIDTH)[carted]], axis=-1)
    return {
        "history": tf.constant(np.stack(history, axis=1), tf.string),
        "user_id": tf.fill([n], "u1"),
        "clicked": tf.fill([n], tf.constant(-1, tf.int64)),
        "candidates": tf.constant(items, tf.int32),
        "retrieval_scores": tf.constant(random.normal(size=(n, WIDTH)), tf.float32),
        "task_labels": tf.constant(labels, tf.int32),
        "weight": tf.ones([n]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_its_tasks_with_all_its_weights(build, kind, tmp_path):
    ranker, raw = build(kind)
    batch = ranker.features(raw)
    order = np.argsort(raw["retrieval_scores"].numpy(), axis=1)
    logits = ranker(batch).numpy()
    assert logits.shape == (24, WIDTH, 2)
    # Before it learns, the order of each task is that of retrieval.
    assert all(np.array_equal(np.argsort(logits[..., t], axis=1), order) for t in range(2))
    step = tf.function(ranker.train_step)
    first = float(ranker.compute_loss(batch))
    for _ in range(60):
        step(batch)
    assert float(ranker.compute_loss(batch)) < first / 2
    variables = ranker.network.head.trainable_variables
    with tf.GradientTape() as tape:
        loss = ranker.compute_loss(batch)
    assert all(np.abs(g.numpy()).max() > 0 for g in tape.gradient(loss, variables))
    hits = ranker(batch).numpy().argmax(axis=1) == raw["task_labels"].numpy().argmax(axis=1)
    assert (hits.mean(axis=0) > 0.8).all()
    # What is saved answers as the model did.
    calibrations = Calibration(0.5, 3.0), Calibration(2.0, -1.0)
    ranker.save_ranker(tmp_path / kind, ranker.features._statistics.numpy(), *calibrations)
    rank = tf.saved_model.load(str(tmp_path / kind)).signatures["rank"]
    found = rank(**{name: raw[name] for name in rank.structured_input_signature[1]})
    expected = ranker(batch).numpy() * [0.5, 2.0] + [3.0, -1.0]
    np.testing.assert_allclose(found["log_odds"].numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["scores"].numpy(), expected[..., 0], rtol=1e-5, atol=1e-5)


def test_more_experts_and_levels_have_more_weights(build):
    def size(kind, **settings):
        ranker, raw = build(kind, **settings)
        ranker(ranker.features(raw))
        return sum(w.shape.num_elements() for w in ranker.network.head.trainable_weights)

    assert size("shared_bottom") < size("mmoe") < size("mmoe", multitask={"experts": 3})
    assert size("ple") < size("ple", multitask={"task_experts": 2})
    assert size("ple", hidden=(8,)) < size("ple", hidden=(8, 8))


def test_a_task_of_weight_near_nothing_is_not_learned(build):
    losses = {}
    for weight in (1.0, 1e-9):
        ranker, raw = build("shared_bottom", tasks={"buy": 1.0, "cart": weight})
        batch = ranker.features(raw)
        with tf.GradientTape() as tape:
            loss = ranker.compute_loss(batch, training=True)
        kernel = ranker.network.head._towers[1]._output.kernel
        losses[weight] = np.abs(tape.gradient(loss, kernel).numpy()).max()
    assert losses[1e-9] == pytest.approx(losses[1.0] * 1e-9, rel=1e-3)


def test_learned_weights_lift_the_smaller_loss():
    weights = TaskWeights([1.0, 2.0], learned=True)
    losses = tf.constant([2.0, 0.02])
    # What is held out is weighed by what the config says.
    assert float(weights(losses)) == pytest.approx(2.04)
    assert float(weights(losses, training=True)) == pytest.approx(2.04)
    optimizer = tf.keras.optimizers.SGD(0.5)
    for _ in range(300):
        with tf.GradientTape() as tape:
            total = weights(losses, training=True)
        optimizer.minimize(total, weights.trainable_variables, tape=tape)
    # At the optimum of Kendall et al. the variance is twice the loss.
    np.testing.assert_allclose(np.exp(weights.trainable_variables[0].numpy()), [4, 0.04], rtol=0.05)
    assert float(weights(losses)) == pytest.approx(2.04)
    assert not TaskWeights([1.0], learned=False).trainable_variables


def test_learned_weights_are_trained_with_the_model(build):
    ranker, raw = build("mmoe", multitask={"weights": "learned"})
    ranker.train_step(ranker.features(raw))
    (variable,) = ranker.task_weights.trainable_variables
    assert np.abs(variable.numpy()).min() > 0


def test_the_listwise_loss_takes_several_positives(build):
    ranker, raw = build("shared_bottom", loss="listwise")
    batch = ranker.features(raw)
    alone = float(ranker.compute_loss(batch))
    buys = raw["task_labels"].numpy()
    buys[:, :, 1] = 1
    assert float(ranker.compute_loss(batch | {"task_labels": tf.constant(buys)})) > 2 * alone
    nothing = batch | {"task_labels": tf.zeros_like(raw["task_labels"])}
    assert float(ranker.compute_loss(nothing)) == 0


def test_the_order_is_that_of_the_weighed_probabilities(build):
    ranker, _ = build("shared_bottom", order={"buy": 1.0, "cart": 3.0})
    odds = tf.constant([[[-9.0, 2.0], [30.0, -30.0], [-1e9, -1e9]]])
    chance = 1 / (1 + np.exp(-odds.numpy()[0, :2].astype(float)))
    mean = chance @ [0.25, 0.75]
    scores = ranker.answers(odds)["scores"].numpy()[0]
    np.testing.assert_allclose(scores[:2], np.log(mean / (1 - mean)), rtol=1e-5)
    assert scores[2] < -1e8
    alone, _ = build("shared_bottom")
    np.testing.assert_allclose(alone.answers(odds)["scores"], odds[..., 0], rtol=1e-6)


def test_a_gate_weighs_by_its_softmax():
    gate = Gate(2)
    said = [tf.ones([1, 3]), tf.fill([1, 3], 5.0)]
    gate(tf.ones([1, 2]), said)
    gate._weights.kernel.assign([[0.0, np.log(3.0)], [0.0, 0.0]])
    np.testing.assert_allclose(gate(tf.ones([1, 2]), said), [[4.0] * 3], rtol=1e-6)
