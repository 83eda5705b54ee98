import numpy as np
import pytest
import tensorflow as tf
from scann.scann_ops.py import scann_ops
from scann.scann_ops.py.scann_builder import ReorderType

from serving_export.searcher import Structure, reordering_int8, restored, search, train

TREE = Structure("tree", 40, 2.0)


@pytest.fixture(scope="module")
def embeddings(tiny):
    return tiny.clustered(2000, 1)


@pytest.fixture(scope="module")
def state(embeddings):
    return train(embeddings, TREE)


def test_equal_embeddings_give_an_equal_state(embeddings, state):
    again = train(embeddings, TREE)
    assert len(state) == 9
    for one, other in zip(state, again, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert state.digest() == again.digest() != reordering_int8(state).digest()


def test_searchers_of_a_corpus_hold_it_once(embeddings, state):
    corpus = tf.constant(embeddings)
    for structure in (TREE, Structure("hashed"), Structure("brute_force")):
        assert train(corpus, structure).dataset is corpus
    given_back = scann_ops.scann_to_tensors(
        scann_ops.builder(embeddings, 1, "dot_product").tree(40, 40).score_ah(2).reorder(1)
        .build().searcher_handle
    )  # fmt: skip
    np.testing.assert_array_equal(given_back[-1], embeddings)
    np.testing.assert_array_equal(state.dataset, embeddings)


def test_int8_is_what_scann_trains(embeddings, state):
    trained = (
        scann_ops.builder(embeddings, 1, "dot_product")
        .tree(40, 40, random_init=False, avq=2.0)
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(1, quantize=ReorderType.INT8)
        .build()
    )
    expected = scann_ops.scann_to_tensors(trained.searcher_handle)

    derived = reordering_int8(state)

    in_scann_s_order = [*derived[1:], derived.dataset]
    assert [t.shape for t in in_scann_s_order] == [t.shape for t in expected]
    for ours, theirs in zip(in_scann_s_order[:5], expected[:5], strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    # ScaNN divides in another way, which the last bit shows.
    np.testing.assert_allclose(derived.multipliers, expected[6], rtol=1e-6)
    apart = np.abs(derived.int8.numpy().astype(int) - expected[5].numpy())
    assert apart.max() <= 1
    assert apart.mean() < 1e-3
    assert derived.bytes < state.bytes / 2


def test_a_dimension_without_values_survives_int8(embeddings):
    flat = embeddings.copy()
    flat[:, 3] = 0
    with restored(reordering_int8(train(flat, Structure("hashed")))) as handle:
        rows, _ = search(handle, tf.constant(flat[:50]), 1, 2000, 1)
    assert rows.numpy().ravel().tolist() == np.argmax(flat[:50] @ flat.T, axis=1).tolist()


def test_exact_search_has_nothing_to_round(embeddings):
    with pytest.raises(RuntimeError, match="does not say how it reorders"):
        reordering_int8(train(embeddings, Structure("brute_force")))


def test_a_searcher_is_freed(state, embeddings):
    with restored(state) as handle:
        search(handle, tf.constant(embeddings[:2]), 5, 50, 40)
    with pytest.raises(tf.errors.NotFoundError):
        search(handle, tf.constant(embeddings[:2]), 5, 50, 40)


def test_avq_finds_long_vectors_in_fewer_leaves(tiny):
    """Why it is the default where norms differ."""
    embeddings, queries = tiny.clustered(4000, 1, spread=0.6), tiny.clustered(200, 2)
    best = tiny.exact_rows(embeddings, queries, 1).ravel()
    found = {}
    for avq in (None, 2.0):
        with restored(train(embeddings, Structure("tree", 63, avq))) as handle:
            rows, _ = search(handle, tf.constant(queries), 1, 100, 3)
        found[avq] = np.mean(rows.numpy().ravel() == best)
    assert found[2.0] > found[None] + 0.05
