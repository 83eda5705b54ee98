import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError
from recsys.dataset import read_corpus
from recsys.ranks import DotProduct
from training.shown import read_item_counts, read_shown

LISTS = [("u", "a", ["f", "zz", "b", "c"], "bf"), ("v", "", ["zz"], ""), ("w", "c", ["e"], "e")]


@pytest.fixture
def data(tiny_data):
    shown = {"validation": LISTS, "test": LISTS[1:]}
    return tiny_data([("t", "b", "a")], [("v", "b", "a")], [("n", "a", "a")], shown=shown)


def test_a_list_keeps_its_order_without_what_is_no_candidate(data):
    shown = read_shown(data, data.impressions.validation, read_corpus(data), 4)
    assert shown.items.tolist() == [[5, 1, 2, -1], [-1] * 4, [4, -1, -1, -1]]
    assert shown.positions.tolist() == [[1, 3, 4, 0], [0] * 4, [1, 0, 0, 0]]
    assert shown.clicked.tolist() == [[True, True, False, False], [False] * 4, [True] + [False] * 3]


def test_a_long_list_is_cut(data):
    shown = read_shown(data, data.impressions.validation, read_corpus(data), 2)
    assert shown.items.tolist() == [[5, 1], [-1, -1], [4, -1]]
    assert shown.clicked.tolist() == [[True, True], [False, False], [True, False]]


def test_retrieval_scores_what_was_shown(data, monkeypatch):
    monkeypatch.setattr("training.shown.BLOCK_BYTES", 2 * 4 * 6)
    shown = read_shown(data, data.impressions.validation, read_corpus(data), 3)
    queries = np.arange(6, dtype=np.float32).reshape(3, 2)
    items = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
    blocks = list(shown.scored(DotProduct(queries, items)))
    assert [block.queries for block in blocks] == [slice(0, 2), slice(2, 3)]
    scores = np.concatenate([block.scores for block in blocks])
    expected = (queries @ items.T)[[0, 0, 0, 2], [5, 1, 2, 4]]
    np.testing.assert_allclose(scores[shown.items >= 0], expected, rtol=1e-5)
    assert np.isneginf(scores[shown.items < 0]).all()


def test_counts_are_those_of_candidates(data):
    times, clicks = read_item_counts(data, read_corpus(data))
    assert times.tolist() == [[0, 1, 2, 3, 4, 5], [9] * 6]
    assert clicks.tolist() == [[0, 0, 1, 1, 2, 2], [5] * 6]


def test_a_corrupt_shard_is_named(data):
    counts = data.corpus.model_copy(update={"path": data.impressions.counts})
    for file in (*data.files(data.impressions.validation), *data.files(counts)):
        whole = tf.io.gfile.GFile(file, "rb").read()
        with tf.io.gfile.GFile(file, "wb") as stream:
            stream.write(whole[:-3])
    with pytest.raises(ArtifactError, match=r"impressions/validation/part-00000.tfrecord is corru"):
        read_shown(data, data.impressions.validation, read_corpus(data), 3)
    with pytest.raises(ArtifactError, match=r"part-00000\S* is corrupt"):
        read_item_counts(data, read_corpus(data))
