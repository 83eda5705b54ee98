import numpy as np
import pytest
import tensorflow as tf

from recsys.calibration import Calibration
from recsys.dataset import read_corpus
from recsys.features import FeatureEncoder
from recsys.models.ranker_features import KnownItems
from recsys.models.ranking import Ranker
from recsys.ranking_config import Ranking

WIDTH = 6


@pytest.fixture(scope="module")
def build(prepared):
    corpus = read_corpus(prepared)
    random = np.random.default_rng(1)
    vectors = random.normal(size=(len(corpus), 4)).astype(np.float32)
    statistics = random.normal(size=(len(corpus), 2)).astype(np.float32)
    encoder = FeatureEncoder(prepared)

    def make(**settings):
        tf.keras.utils.set_random_seed(1)
        config = Ranking.model_validate({"dropout": 0.0, "attention_dim": 8} | settings)
        items = KnownItems(corpus, vectors, statistics)
        ranker = Ranker(config, prepared.features, encoder, items, 1, prior=-2.0)
        ranker.compile(optimizer=tf.keras.optimizers.Adam(0.02))
        return ranker, corpus

    return make


def requests(corpus, n=32):
    """The wanted candidate is the one that was seen last; retrieval knows nothing of it."""
    random = np.random.default_rng(2)
    items = np.stack([random.choice(len(corpus), WIDTH, replace=False) for _ in range(n)])
    place = random.integers(0, WIDTH, n)
    seen = corpus.item[items[np.arange(n), place]]
    other = corpus.item[random.integers(0, len(corpus), n)]
    return {
        "history": tf.constant(np.stack([other, seen, [b""] * n], axis=1), tf.string),
        "user_id": tf.fill([n], "u1"),
        "clicked": tf.fill([n], tf.constant(-1, tf.int64)),
        "candidates": tf.constant(items, tf.int32),
        "retrieval_scores": tf.constant(random.normal(size=(n, WIDTH)), tf.float32),
        "label_place": tf.constant(place, tf.int32),
        "weight": tf.ones([n]),
    }


def test_before_it_learns_the_order_is_that_of_retrieval(build):
    ranker, corpus = build()
    raw = requests(corpus)
    logits = ranker(ranker.features(raw)).numpy()
    assert np.array_equal(
        np.argsort(logits, axis=1), np.argsort(raw["retrieval_scores"].numpy(), axis=1)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "pointwise"},
        {"loss": "listwise"},
        {"loss": "pairwise"},
        {"loss": "pointwise", "cross_rank": 4},
        {"loss": "pairwise", "interaction": "dot", "bottom": (16, 8)},
        {"loss": "listwise", "cross_layers": 0, "hidden": ()},
    ],
    ids=["pointwise", "listwise", "pairwise", "low rank", "dot products", "no crosses"],
)
def test_it_learns_what_the_history_says_of_a_candidate(build, settings):
    ranker, corpus = build(**settings)
    raw = requests(corpus)
    batch = ranker.features(raw)
    step = tf.function(ranker.train_step)
    first = float(ranker.compute_loss(batch))
    losses = [float(step(batch)["loss"]) for _ in range(80)]
    # What is told is the mean of the epoch so far.
    assert losses[0] == pytest.approx(first, rel=1e-4)
    last = float(ranker.compute_loss(batch))
    assert last < first / 3
    assert last < losses[-1] < first
    assert ranker.step.numpy() == 80
    other = ranker.features(requests(corpus))
    hits = ranker(other).numpy().argmax(axis=1) == other["label_place"].numpy()
    assert hits.mean() > 0.9


def test_low_rank_crosses_have_fewer_weights(build):
    sizes = []
    for rank in (None, 4):
        ranker, corpus = build(cross_rank=rank)
        ranker(ranker.features(requests(corpus, 2)))
        sizes.append(
            sum(
                w.shape.num_elements()
                for w in ranker.network._interaction._layers[0].trainable_weights
            )
        )
    assert sizes[1] < sizes[0] / 2


def test_what_a_position_explains_is_left_out_where_one_serves(build):
    ranker, corpus = build(loss="pointwise")
    raw = requests(corpus, 200)
    # What is shown first is clicked, whatever it is.
    first = np.zeros((200, WIDTH, 1))
    first[:, 0] = 1
    positions = tf.tile(tf.range(1, WIDTH + 1)[tf.newaxis], [200, 1])
    batch = ranker.features(raw) | {"task_labels": tf.constant(first), "positions": positions}
    step = tf.function(ranker.train_step)
    for _ in range(40):
        step(batch)
    served = ranker(ranker.features(raw)).numpy()
    added = ranker(batch).numpy() - served
    # Later places are worse, whatever is shown there; served, all are as if they were the first.
    np.testing.assert_allclose(added, added[:1].repeat(200, axis=0), atol=1e-3)
    assert added[0, 0] == 0
    assert (added[0, 1:] < -0.3).all()
    nowhere = batch | {"positions": tf.zeros_like(positions)}
    np.testing.assert_allclose(ranker(nowhere).numpy(), served, atol=1e-5)


def test_what_is_no_candidate_counts_for_nothing(build):
    for loss in ("pointwise", "pairwise", "listwise"):
        ranker, corpus = build(loss=loss)
        raw = requests(corpus)
        raw["label_place"] = tf.zeros_like(raw["label_place"])
        raw["candidates"] = tf.concat([raw["candidates"][:, :4], tf.fill([32, 2], -1)], axis=1)
        raw["retrieval_scores"] = tf.concat(
            [raw["retrieval_scores"][:, :4], tf.fill([32, 2], -np.inf)], axis=1
        )
        narrow = raw | {n: raw[n][:, :4] for n in ("candidates", "retrieval_scores")}
        wide_loss, narrow_loss = (
            float(ranker.compute_loss(ranker.features(r))) for r in (raw, narrow)
        )
        assert wide_loss == pytest.approx(narrow_loss, rel=1e-5)


def test_a_request_without_its_label_teaches_the_pointwise_loss_alone(build):
    nothing = {"label_place": tf.fill([32], -1)}
    for loss in ("pairwise", "listwise"):
        ranker, corpus = build(loss=loss)
        assert float(ranker.compute_loss(ranker.features(requests(corpus) | nothing))) == 0.0
    ranker, corpus = build(loss="pointwise")
    assert float(ranker.compute_loss(ranker.features(requests(corpus) | nothing))) > 0.0


@pytest.mark.parametrize("interaction", ["cross", "dot"])
def test_what_is_saved_answers_as_the_model_did(build, interaction, tmp_path):
    ranker, corpus = build(interaction=interaction)
    raw = requests(corpus)
    step = tf.function(ranker.train_step)
    for _ in range(5):
        step(ranker.features(raw))
    statistics = ranker.features._statistics.numpy() + 1
    ranker.save_ranker(tmp_path / "ranker", statistics, Calibration(0.5, 3.0))
    expected = 0.5 * ranker(ranker.features(raw)).numpy() + 3
    rank = tf.saved_model.load(str(tmp_path / "ranker")).signatures["rank"]
    names = rank.structured_input_signature[1]
    found = rank(**{name: raw[name] for name in names})["scores"].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    raw["candidates"] = tf.concat([raw["candidates"][:, :3], tf.fill([32, 3], -1)], axis=1)
    assert np.isneginf(rank(**{n: raw[n] for n in names})["scores"].numpy()[:, 3:]).all()
