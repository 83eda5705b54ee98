import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError
from recsys.dataset import read_corpus
from training.embeddings import _latest, two_tower_scorer

TRAIN = [("u", "b", "a")]
NONE = np.zeros((3, 0), np.int32)
TEST = [("u", "c", "ab"), ("v", "a", ""), ("w", "b", "fa")]


@pytest.fixture
def data(tiny_data):
    return tiny_data(TRAIN, [], TEST)


def test_scores_are_the_dot_products_in_file_order(data, tiny_towers):
    scores = two_tower_scorer(tiny_towers(), data, read_corpus(data), NONE).scores(slice(0, 3))
    price = np.arange(6, 0, -1) / 100
    np.testing.assert_allclose(scores, [price + np.eye(6)[2], price, price + np.eye(6)[1]])


def test_a_savedmodel_of_another_schema_names_the_missing_features(data, tiny_towers):
    towers = tiny_towers(history="basket")
    with pytest.raises(ArtifactError, match=r"embed_query reads features .*\['basket'\].*country"):
        two_tower_scorer(towers, data, read_corpus(data), NONE)


def test_an_input_of_another_type_is_named(data, tiny_towers):
    towers = tiny_towers(price_dtype=tf.int64)
    with pytest.raises(ArtifactError, match=r"embed_candidate reads 'price' as int64.*float32"):
        two_tower_scorer(towers, data, read_corpus(data), NONE)


def test_embeddings_that_are_not_finite_are_refused(data, tiny_towers):
    with pytest.raises(ArtifactError, match="3 of 3 embeddings that are not finite"):
        two_tower_scorer(tiny_towers(broken=True), data, read_corpus(data), NONE)


def test_a_folder_without_savedmodel_is_named(data, tmp_path):
    with pytest.raises(ArtifactError, match="nowhere cannot be loaded as a SavedModel"):
        two_tower_scorer(tmp_path / "nowhere", data, read_corpus(data), NONE)


def test_a_savedmodel_without_the_signatures_is_named(data, tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path / "other"))
    with pytest.raises(ArtifactError, match="no signature 'embed_query'"):
        two_tower_scorer(tmp_path / "other", data, read_corpus(data), NONE)


def test_a_model_that_lists_fewer_or_more_events_gets_its_latest_ones():
    history = np.array([[1, 2, 3, -1], [4, 5, 6, 7], [8, -1, -1, -1]], np.int32)
    assert _latest(history, 2).tolist() == [[2, 3], [6, 7], [8, -1]]
    assert _latest(history, 5).tolist() == [[1, 2, 3, -1, -1], [4, 5, 6, 7, -1], [8, *[-1] * 4]]
    assert _latest(NONE, 2).tolist() == [[-1, -1]] * 3


def test_a_corrupt_shard_is_named(data, tiny_towers):
    corpus = read_corpus(data)
    shard = next((data.directory / "test").iterdir())
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=r"part-00000\.tfrecord is corrupt"):
        two_tower_scorer(tiny_towers(), data, corpus, NONE)
