import numpy as np
import pytest
import tensorflow as tf

from recsys.features import FeatureEmbedding, FeatureEncoder, masked_mean, raw_signature
from recsys.schema import Feature, Schema


@pytest.fixture(scope="module")
def encoder(prepared):
    return FeatureEncoder(prepared)


def encode(encoder, **raw):
    return {name: value.numpy() for name, value in encoder(raw).items()}


def test_ids_missing_unknown_and_known(encoder, prepared):
    file = prepared.directory / prepared.vocabularies["item_id"].path
    first = file.read_text().splitlines()[0]
    codes = encode(encoder, item_id=tf.constant(["", "nobody", first]))["item_id"]
    assert codes.tolist() == [0, 1, 2]


def test_oov_buckets_spread_unknown_ids(encoder):
    unknown = tf.constant([f"stranger {i}" for i in range(100)])
    codes = encode(encoder, user_id=unknown)["user_id"]
    assert set(codes.tolist()) == {1, 2}


def test_history_shares_the_vocabulary_of_what_it_lists(encoder):
    ids = tf.constant([["i1", "i2", ""]])
    coded = encode(encoder, history=ids, item_id=ids[0])
    assert coded["history"][0].tolist() == coded["item_id"].tolist()
    assert coded["history"][0, 2] == 0


def test_numbers_are_z_scores_and_missing_ones_are_marked(encoder, prepared):
    statistics = prepared.statistics["price"]
    values = tf.constant([statistics.mean + statistics.std, np.nan, np.inf])
    coded = encode(encoder, price=values)["price"]
    np.testing.assert_allclose(coded, [[1, 0], [0, 1], [0, 1]], atol=1e-5)


def test_time_is_cyclic_and_missing_time_is_zero(encoder):
    day, week = 86_400_000_000, 7 * 86_400_000_000
    coded = encode(encoder, clicked=tf.constant([day // 4, day // 4 + week, -1], tf.int64))
    np.testing.assert_allclose(coded["clicked"][0], coded["clicked"][1], atol=1e-4)
    np.testing.assert_allclose(coded["clicked"][0][0], 1, atol=1e-6)
    assert coded["clicked"][2].tolist() == [0, 0, 0, 0]


def test_text_hashes_words_of_any_script_without_case(encoder):
    coded = encode(encoder, title=tf.constant(["Größe GRÖSSE größe", "", "a b c d e f"]))["title"]
    assert coded.shape == (3, 4)
    assert coded[0, 0] == coded[0, 2]
    assert coded[1].tolist() == [0, 0, 0, 0]
    assert (coded[2] > 0).all()
    assert coded.max() <= 50


def test_vectors_pass_and_what_is_not_finite_is_zero(prepared):
    vector = Feature(name="v", side="candidate", kind="vector", dim=2)
    schema = Schema(features=(*prepared.features.features, vector))
    encoder = FeatureEncoder(prepared.model_copy(update={"features": schema}))
    coded = encode(encoder, v=tf.constant([[1.0, -2.0], [np.nan, np.inf]]))["v"]
    assert coded.tolist() == [[1, -2], [0, 0]]
    assert raw_signature([vector])["v"].shape.as_list() == [None, 2]


def test_unknown_keys_pass_through(encoder):
    assert encode(encoder, row=tf.constant([3]))["row"].tolist() == [3]


def test_a_graph_encodes_without_a_warning(encoder, caplog):
    raw = tf.data.Dataset.from_tensors({"item_id": tf.constant(["nobody"])})
    encoded = list(raw.map(lambda batch: encoder(batch)))
    assert encoded[0]["item_id"].numpy().tolist() == [1]
    assert "AutoGraph" not in caplog.text


def test_embedding_widths(prepared, encoder):
    embedding = FeatureEmbedding(prepared.features, encoder.vocabulary_sizes(), dim=16)
    raw = {
        "item_id": tf.constant(["i1", ""]),
        "cluster": tf.constant(["c1", "c2"]),
        "price": tf.constant([1.0, np.nan]),
        "title": tf.constant(["item 1", ""]),
    }
    vectors = embedding(prepared.features.candidate, encoder(raw))
    assert vectors.shape == (2, 16 + 4 + 2 + 8)


def test_masked_mean_ignores_padding_and_survives_emptiness():
    values = tf.constant([[[1.0], [3.0], [100.0]], [[5.0], [5.0], [5.0]]])
    mask = tf.constant([[True, True, False], [False, False, False]])
    assert masked_mean(values, mask).numpy().tolist() == [[2.0], [0.0]]


def test_signature_has_the_raw_types(prepared):
    signature = raw_signature(prepared.features.query)
    assert signature["history"].shape.as_list() == [None, None]
    assert signature["history"].dtype == tf.string
    assert signature["clicked"].dtype == tf.int64
