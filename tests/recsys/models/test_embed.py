import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError
from recsys.models.embed import BATCH, embed, in_batches, load_towers


class Scaler(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None], name="x")])
    def scale(self, x):
        return {"embedding": tf.stack([x, 1 / x], axis=1)}


@pytest.fixture
def towers(tmp_path):
    scaler = Scaler()
    signatures = {"embed_query": scaler.scale, "embed_candidate": scaler.scale}
    tf.saved_model.save(scaler, str(tmp_path / "towers"), signatures)
    return load_towers(tmp_path / "towers")


def test_rows_keep_their_order_over_batches_and_other_features_are_ignored(towers):
    features = {"x": np.arange(1, BATCH + 3, dtype=np.float32), "y": np.zeros(BATCH + 2)}
    embedded = embed(towers, "embed_query", in_batches(features))["embedding"]
    np.testing.assert_allclose(embedded[:, 0], features["x"])
    assert embedded.shape == (BATCH + 2, 2)


def test_embeddings_that_are_not_finite_are_refused(towers):
    with pytest.raises(ArtifactError, match="embed_query gives 1 of 2 embeddings that are not fin"):
        embed(towers, "embed_query", in_batches({"x": np.array([1, 0], np.float32)}))


def test_what_is_no_pair_of_towers_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be loaded as a SavedModel"):
        load_towers(tmp_path)
    scaler = Scaler()
    tf.saved_model.save(scaler, str(tmp_path / "one"), {"embed_query": scaler.scale})
    with pytest.raises(ArtifactError, match="has no signature 'embed_candidate', only"):
        load_towers(tmp_path / "one")
