"""A joint training from the click table to the exported model."""

import numpy as np
import pytest
import tensorflow as tf

from recsys.config import load_config
from recsys.dataset import raw_batches, read_corpus
from recsys.models.embed import embed, in_batches, load_towers
from serving_export.savedmodel import export
from training.fit import fit
from training.prepare import prepare

#: Dear items are liked; what is not liked is nothing to retrieve.
SETTINGS = (
    "data.events.derive={liked: \"if(double(price) >= 13, 'like', 'dislike')\"}",
    "data.events.columns.event=liked",
    "data.event_types={like: {}, dislike: {label: false}}",
    "model.joint={positive: [like], weight: 0.5}",
    "model.history.kind=mean",
    "train.epochs=3",
    "train.refit=true",
)


@pytest.mark.spark
def test_both_tasks_are_logged_and_the_exported_head_ranks(clicks_config, spark, tmp_path):
    config = load_config(clicks_config, SETTINGS)
    data = prepare(config, spark, tmp_path / "data")
    assert data.judged["train"]["dislike"] > 100
    # A dislike after the last like is learned from too.
    assert data.train.last_at <= data.judged_until < data.validation.first_at
    logged = []
    model = fit(config, data, tmp_path / "model", "run", logged.append)
    curves = logged[-1]
    assert {"loss", "retrieval_loss", "ranking_loss", "auc", config.train.monitor} <= set(curves)
    assert {len(curve) for curve in curves.values()} == {3}
    sums = np.add(curves["retrieval_loss"], np.multiply(0.5, curves["ranking_loss"]))
    np.testing.assert_allclose(curves["loss"], sums, rtol=1e-4)
    assert curves["auc"][-1] > 0.9
    assert curves["retrieval_loss"][-1] < 0.9 * curves["retrieval_loss"][0]
    assert model.learned_until == data.judged_until
    assert model.best_epoch == 1 + int(np.argmax(curves[config.train.monitor]))
    exported = export(config, data, model, tmp_path / "export")
    raw = next(iter(raw_batches(data, data.test, 4)))
    corpus, towers = read_corpus(data), load_towers(model.directory / model.towers)
    asked = np.stack([corpus.item[:3]] * 4)
    served = tf.saved_model.load(str(exported.directory / exported.variants["exact"]))
    scores = served.signatures["rank"](**raw, candidates=tf.constant(asked, tf.string))["scores"]
    items = embed(towers, "embed_candidate", in_batches(corpus.features))["embedding"]
    queries = embed(towers, "embed_query", [raw])["embedding"]
    candidates = tf.stack([items[:3]] * 4)
    head = towers.signatures["log_odds"](queries=tf.constant(queries), candidates=candidates)
    np.testing.assert_allclose(scores, head["log_odds"], rtol=1e-5, atol=1e-5)
