import numpy as np
import pytest
import tensorflow as tf

from recsys.dataset import read_corpus
from recsys.features import FeatureEncoder
from recsys.models.ranker_features import KnownItems, RankerFeatures


@pytest.fixture(scope="module")
def corpus(prepared):
    return read_corpus(prepared)


@pytest.fixture(scope="module")
def features(prepared, corpus):
    vectors = np.random.default_rng(1).normal(size=(len(corpus), 4)).astype(np.float32)
    statistics = np.arange(2 * len(corpus), dtype=np.float32).reshape(-1, 2)
    items = KnownItems(corpus, vectors, statistics)
    return RankerFeatures(prepared.features, FeatureEncoder(prepared), items)


def test_ids_are_left_to_the_vectors(features):
    assert [f.name for f in features.query] == ["clicked"]
    assert [f.name for f in features.candidate] == ["cluster", "price", "title"]
    assert features.item_history.name == "history"


def test_a_history_lists_corpus_rows(features, corpus):
    first = corpus.item[0].decode()
    encoded = features({"history": tf.constant([[first, "no item", ""]]), "weight": [1.0]})
    assert encoded["history"].numpy().tolist() == [[0, -1, -1]]
    assert encoded["weight"] == [1.0]
    assert features.known(encoded).numpy().tolist() == [[True, False, False]]


def test_vectors_have_about_unit_entries_and_no_item_has_none(features):
    vectors = features.vectors(tf.constant([[0, 5], [-1, 1]])).numpy()
    np.testing.assert_allclose((vectors[0] ** 2).mean(axis=1), 1, rtol=1e-5)
    assert not vectors[1, 0].any()


def test_retrieval_scores_are_standardised_and_ranked(features):
    features.standardise_scores(2.0, 0.5)
    scores = features.standard_scores(tf.constant([[3.0, 2.0, -np.inf, 2.5]])).numpy()[0]
    np.testing.assert_allclose(scores[:2, 0], [2, 0])
    np.testing.assert_allclose(scores[:2, 1], [0, 2])
    assert np.isfinite(scores).all()
    assert np.argsort(scores[:, 2]).tolist() == [0, 3, 1, 2]


def test_statistics_can_be_renewed(features):
    rows = tf.constant([[1]])
    assert features.statistics(rows).numpy().tolist() == [[[2, 3]]]
    features.renew(np.zeros(features._statistics.shape, np.float32))
    assert features.statistics(rows).numpy().tolist() == [[[0, 0]]]
