"""The contract of a retrieval model, over every history encoder and loss."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from recsys.dataset import read_corpus, read_sequences
from recsys.features import FeatureEncoder
from recsys.model_config import TwoTowerConfig
from recsys.models.retrieval import TwoTower, _labels_of_sequence
from recsys.neighbours import neighbours
from recsys.sequences import Order, training_batches

LOSSES = {
    "full": {"full_softmax_up_to": 1000},
    "mixed": {"full_softmax_up_to": 0, "num_uniform_negatives": 30, "num_popular_negatives": 10},
    "in batch, dot product": {
        "full_softmax_up_to": 0,
        "num_uniform_negatives": 0,
        "normalize": False,
        "temperature": 1.0,
    },
    "drawn": {"full_softmax_up_to": 0, "num_uniform_negatives": 30, "in_batch_negatives": False},
    "hard": {"full_softmax_up_to": 0, "num_uniform_negatives": 30, "num_hard_negatives": 20},
}
ENCODERS = ("mean", "gru", "lstm", "attention")
PAIRS = [(encoder, loss) for encoder in ENCODERS for loss in LOSSES]
#: Every encoder with the full softmax, every loss with attention: for what takes a training.
STAR = [(encoder, loss) for encoder, loss in PAIRS if loss == "full" or encoder == "attention"]
RAW = {
    "history": [
        ["i1", "i2", "", "", ""],
        ["", "", "", "", ""],
        ["i7", "no item", "i3", "i3", "i9"],
    ],
    "user_id": ["u1", "a stranger", "u3"],
    "clicked": [1_704_067_200_000_000, -1, 1_704_153_600_000_000],
}


@pytest.fixture(scope="module")
def corpus(prepared):
    return read_corpus(prepared)


@pytest.fixture(scope="module")
def encoder(prepared):
    return FeatureEncoder(prepared)


@pytest.fixture(scope="module")
def one_epoch(prepared, corpus, encoder):
    """Batches of 32 sequences, as a training reads them; what makes them is traced once."""
    return batches(prepared, corpus, encoder).cache()


@pytest.fixture(scope="module")
def batch(prepared, corpus, encoder):
    return next(iter(batches(prepared, corpus, encoder, size=8)))


@pytest.fixture(params=STAR, ids="-".join, scope="module")
def build(request, prepared, corpus, encoder):
    return maker(*request.param, prepared, corpus, encoder)


@pytest.fixture(scope="module")
def trained(build, one_epoch):
    """A model after four epochs, the loss of the first, and that of the others."""
    model = build()
    first = model.fit(one_epoch, verbose=0).history["loss"]
    return model, first[0], model.fit(one_epoch, epochs=3, verbose=0).history["loss"]


def maker(kind, loss, prepared, corpus, encoder):
    def make(seed=1, **settings):
        tf.keras.utils.set_random_seed(seed)
        config = TwoTowerConfig.model_validate(
            {"embedding_dim": 16, "dropout": 0.0, "hidden": [8], "history": {"kind": kind}}
            | {"loss": LOSSES[loss]}
            # Neighbours may not break what holds of any loss.
            | {"num_neighbours": 3 if loss in ("full", "mixed") else 0}
            | settings
        )
        exclude_seen = loss == "mixed"
        model = TwoTower(config, prepared.features, encoder, corpus, seed, exclude_seen)
        if near := config.num_neighbours:
            model.connect(neighbours(prepared, [prepared.train], encoder, near))
        model.compile(optimizer=tf.keras.optimizers.Adam(0.02))
        return model

    return make


def batches(prepared, corpus, encoder, size=32):
    rows = corpus.rows()

    def encode(raw):
        row = rows.lookup(raw.pop("label"))
        return encoder(raw) | {"row": row, "pool": rows.lookup(raw["pool"])}

    raw = training_batches(prepared, [prepared.train], size, Order(range(1), 1, 5000))
    return raw.map(encode)


def raw_queries():
    types = {"clicked": tf.int64}
    return {name: tf.constant(v, types.get(name, tf.string)) for name, v in RAW.items()}


def test_loss_falls_on_planted_data(trained):
    _, first, others = trained
    assert np.mean(others) < 0.85 * first


@pytest.mark.parametrize(("kind", "loss"), PAIRS)
def test_every_variable_moves_in_one_step_and_a_batch_is_learned(
    kind, loss, prepared, corpus, encoder, batch
):
    model = maker(kind, loss, prepared, corpus, encoder)(share_item_embeddings=False)
    first = float(model.train_step(batch)["loss"])
    before = [variable.numpy() for variable in model.trainable_variables]
    model.train_step(batch)
    still = [
        variable.name
        for variable, old in zip(model.trainable_variables, before, strict=True)
        if np.array_equal(variable.numpy(), old)
    ]
    assert before
    assert not still
    model.reset_metrics()
    later = [model.train_step(batch)["loss"] for _ in range(6)][-1]
    assert later < 0.9 * first


def test_one_pass_over_a_sequence_gives_what_each_of_its_queries_gives(trained, encoder, prepared):
    """A label along a shared history is embedded as a server would embed its query alone."""
    model, *_ = trained
    raw = training_batches(prepared, [prepared.train], 8, Order(range(1), 1, 5000))
    batch = next(iter(raw))
    together = model(encoder(batch))
    listed = tf.gather(batch["history"], batch["sequence"]).numpy()
    listed[np.arange(listed.shape[1]) >= batch["known"].numpy()[:, None]] = b""
    alone = {name: batch[name] for name in ("user_id", "clicked")} | {"history": listed}
    for name, values in model(encoder(alone)).items():
        np.testing.assert_allclose(values, together[name], rtol=1e-4, atol=1e-5)


def test_same_seed_same_model_and_another_seed_another(build, batch):
    def losses(seed, steps):
        model = build(seed, dropout=0.3, id_dropout=0.2)
        # Step by step without a graph: tracing three models takes far longer than their steps.
        return [float(model.train_step(batch)["loss"]) for _ in range(steps)]

    first = losses(1, 2)
    assert losses(1, 2) == pytest.approx(first, rel=1e-6)
    assert losses(2, 1) != pytest.approx(first[:1], rel=1e-4)


def test_saved_towers_answer_like_the_model(trained, encoder, corpus, tmp_path):
    model, *_ = trained
    raw = raw_queries()
    expected = model.embed_queries(encoder(raw))
    model.towers.save(tmp_path / "towers")
    loaded = tf.saved_model.load(str(tmp_path / "towers"))
    embedded = loaded.signatures["embed_query"](**raw)
    one = loaded.signatures["embed_query"](**{name: value[:1] for name, value in raw.items()})
    assert set(embedded) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(embedded[name], values, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(one[name], values[:1], rtol=1e-5, atol=1e-6)
        assert np.isfinite(values).all()
    features = {name: tf.constant(values) for name, values in corpus.features.items()}
    items = loaded.signatures["embed_candidate"](**features)["embedding"].numpy()
    np.testing.assert_allclose(items, model.embed_corpus(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["hard", "mixed"])
def test_a_corpus_of_one_warm_item_and_a_batch_of_one(prepared, corpus, encoder, loss):
    single = dataclasses.replace(corpus, count=np.eye(1, len(corpus), dtype=np.int64)[0])
    config = TwoTowerConfig.model_validate({"embedding_dim": 8, "loss": LOSSES[loss]})
    model = TwoTower(config, prepared.features, encoder, single, 1)
    model.compile(optimizer=tf.keras.optimizers.Adam(0.02))
    raw = training_batches(prepared, [prepared.train], 1, Order(range(1), 1, 100))
    batch = next(iter(raw))
    batch.pop("label")
    row = tf.zeros_like(batch["known"])
    assert np.isfinite(model.train_step(encoder(batch) | {"row": row, "pool": row})["loss"])


def test_without_in_batch_negatives_a_label_competes_with_what_was_drawn_alone(
    prepared, corpus, encoder
):
    """Labels of other queries that were not drawn get no gradient from a query."""
    config = TwoTowerConfig.model_validate({"embedding_dim": 8, "loss": LOSSES["drawn"]})
    model = TwoTower(config, prepared.features, encoder, corpus, 1)
    row = tf.constant([3, 5, 3], tf.int32)
    rows, labels, log_probability = model._draw(row)
    drawn = set(model._uniform().numpy().tolist())
    assert tf.gather(rows, labels).numpy().tolist() == row.numpy().tolist()
    assert set(rows.numpy().tolist()) == drawn | {3, 5}
    reached = {r for r, p in zip(rows.numpy(), log_probability.numpy(), strict=True) if p <= 0}
    assert reached == drawn
    expected = np.log(1 - (1 - 1 / model._num_warm) ** 30)
    assert log_probability.numpy()[np.isin(rows, list(drawn))] == pytest.approx(expected, rel=1e-4)


def test_labels_of_one_sequence_are_no_negatives_of_each_other():
    labels, sequence = tf.constant([7, 8, 9, 7], tf.int32), tf.constant([0, 0, 2, 2], tf.int32)
    expected = [[7, 8], [7, 8], [9, 7], [9, 7]]
    assert _labels_of_sequence(labels, sequence).numpy().tolist() == expected
    uneven = _labels_of_sequence(labels[:3], sequence[:3])
    assert uneven.numpy().tolist() == [[7, 8], [7, 8], [9, -1]]


def test_seen_items_are_no_negatives_where_they_are_excluded(prepared, corpus, encoder, one_epoch):
    config = TwoTowerConfig.model_validate({"embedding_dim": 16})
    model = TwoTower(config, prepared.features, encoder, corpus, 1, exclude_seen=True)
    batch = next(iter(one_epoch))
    rows = tf.range(len(corpus))
    found = model._seen(batch, rows).numpy()
    names = [[corpus.item[row].decode() for row in line if row >= 0] for line in found]
    read = read_sequences(prepared, prepared.train, corpus)
    expected = {
        tuple(corpus.item[row].decode() for row in line if row >= 0) for line in read.history
    }
    assert {tuple(line) for line in names} <= expected
    assert max(map(len, names)) > 2


def test_an_unseen_item_lies_near_those_that_share_its_features(
    prepared, corpus, encoder, one_epoch
):
    """Dropped ids teach the features to carry an item whose id is unknown."""
    config = TwoTowerConfig.model_validate(
        {"embedding_dim": 16, "dropout": 0.0, "id_dropout": 0.5, "history": {"kind": "mean"}}
    )
    tf.keras.utils.set_random_seed(1)
    model = TwoTower(config, prepared.features, encoder, corpus, 1)
    model.compile(optimizer=tf.keras.optimizers.Adam(0.02))
    model.fit(one_epoch, epochs=4, verbose=0)
    raw = {name: tf.constant(values[:1]) for name, values in corpus.features.items()}
    raw["item_id"] = tf.constant(["never seen"])
    unseen = model.candidate_tower(encoder(raw)).numpy()[0]
    similarity = model.embed_corpus().numpy() @ unseen
    same = corpus.features["cluster"] == corpus.features["cluster"][0]
    assert similarity[same].mean() > similarity[~same].mean() + 0.3


@pytest.mark.parametrize(("loss", "kind"), [("full", tf.Tensor), ("drawn", tf.IndexedSlices)])
def test_only_a_step_that_reads_all_rows_of_a_table_has_a_gradient_of_the_table(
    prepared, corpus, encoder, batch, loss, kind
):
    config = TwoTowerConfig.model_validate({"embedding_dim": 8, "loss": LOSSES[loss]})
    model = TwoTower(config, prepared.features, encoder, corpus, 1)
    with tf.GradientTape() as tape:
        value = model.compute_loss(batch, training=True)
    gradients = dict(
        zip([v.name for v in model.trainable_variables], model.gradients(tape, value), strict=True)
    )
    tables = {name.split("/")[-2]: g for name, g in gradients.items() if "embeddings" in name}
    assert isinstance(tables["item_id"], kind)
    assert isinstance(tables["user_id"], tf.IndexedSlices)
