"""The contract of a retrieval model, over both losses."""

import numpy as np
import pytest
import tensorflow as tf

from recsys.config import TwoTowerConfig
from recsys.dataset import read_corpus, training_batches
from recsys.features import FeatureEncoder
from recsys.models.retrieval import TwoTower

LOSSES = {
    "full": {"full_softmax_up_to": 1000},
    "sampled": {"full_softmax_up_to": 0, "num_uniform_negatives": 30},
    "in batch, dot product": {
        "full_softmax_up_to": 0,
        "num_uniform_negatives": 0,
        "normalize": False,
        "temperature": 1.0,
    },
}


@pytest.fixture(scope="module")
def corpus(prepared):
    return read_corpus(prepared)


@pytest.fixture(params=LOSSES, scope="module")
def build(request, prepared, corpus):
    def make(seed=1, dropout=0.0):
        tf.keras.utils.set_random_seed(seed)
        config = TwoTowerConfig.model_validate(
            {"embedding_dim": 16, "dropout": dropout, "hidden": [8], "loss": LOSSES[request.param]}
        )
        encoder = FeatureEncoder(prepared)
        model = TwoTower(config, prepared.features, encoder, corpus, seed)
        model.compile(optimizer=tf.keras.optimizers.Adam(0.02))
        return model, encoder

    return make


def batches(prepared, corpus, encoder, epochs=1):
    rows = corpus.rows()

    def encode(raw):
        row = rows.lookup(raw.pop("label"))
        return encoder(raw) | {"row": row}

    return training_batches(prepared, 128, range(epochs), seed=1, buffer=5000).map(encode)


def test_loss_falls_on_planted_data(build, prepared, corpus):
    model, encoder = build()
    losses = model.fit(batches(prepared, corpus, encoder), verbose=0).history["loss"]
    again = model.fit(batches(prepared, corpus, encoder, 3), verbose=0).history["loss"]
    assert again[-1] < 0.8 * losses[0]


def test_every_trainable_variable_moves_in_one_step(build, prepared, corpus):
    model, encoder = build()
    batch = next(iter(batches(prepared, corpus, encoder)))
    model.train_step(batch)
    before = [variable.numpy() for variable in model.trainable_variables]
    model.train_step(batch)
    still = [
        variable.name
        for variable, old in zip(model.trainable_variables, before, strict=True)
        if np.array_equal(variable.numpy(), old)
    ]
    assert before
    assert not still


def test_same_seed_same_model_and_another_seed_another(build, prepared, corpus):
    def losses(seed):
        model, encoder = build(seed, dropout=0.3)
        return model.fit(batches(prepared, corpus, encoder), verbose=0).history["loss"]

    assert losses(1) == pytest.approx(losses(1), rel=1e-6)
    assert losses(1) != pytest.approx(losses(2), rel=1e-4)


def test_saved_towers_answer_like_the_model(build, prepared, corpus, tmp_path):
    model, encoder = build()
    raw = {
        "history": tf.constant([["i1", "i2", "", "", ""], ["", "", "", "", ""]]),
        "user_id": tf.constant(["u1", "a stranger"]),
        "clicked": tf.constant([1_704_067_200_000_000, -1], tf.int64),
    }
    expected = model.embed_queries(encoder(raw)).numpy()
    model.towers.save(tmp_path / "towers")
    loaded = tf.saved_model.load(str(tmp_path / "towers"))
    embedded = loaded.signatures["embed_query"](**raw)["embedding"].numpy()
    np.testing.assert_allclose(embedded, expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(embedded).all()
    features = {name: tf.constant(values) for name, values in corpus.features.items()}
    items = loaded.signatures["embed_candidate"](**features)["embedding"].numpy()
    np.testing.assert_allclose(items, model.embed_corpus(), rtol=1e-5, atol=1e-6)
    one = loaded.signatures["embed_query"](**{name: value[:1] for name, value in raw.items()})
    np.testing.assert_allclose(one["embedding"], expected[:1], rtol=1e-5, atol=1e-6)
