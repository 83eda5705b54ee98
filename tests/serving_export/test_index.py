import numpy as np
import pytest
import tensorflow as tf

from serving_export.index import Effort, ExactIndex, ScannIndex
from serving_export.searcher import Structure, reordering_int8, train

DIM = 16


def brute_force(embeddings, k):
    size = len(embeddings)
    return ScannIndex(train(embeddings, Structure("brute_force")), size, Effort(k, 1, 1, size))


@pytest.fixture(scope="module")
def tree(tiny):
    embeddings = tiny.clustered(4000, 1)
    state = train(embeddings, Structure("tree", 63, 2.0))
    effort = Effort(k=10, num_leaves=63, leaves_to_search=6, reorder=40)
    indexes = {
        32: ScannIndex(state, 4000, effort),
        8: ScannIndex(reordering_int8(state), 4000, effort),
    }
    return embeddings, tiny.clustered(50, 2), indexes


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("count", [1, 10, 1000, 4000, 9000])
def test_tree_finds_as_many_as_asked_for(tree, count, bits):
    embeddings, queries, indexes = tree

    rows, scores = indexes[bits].search(tf.constant(queries), tf.constant(count))

    width = min(count, 4000)
    assert rows.shape == scores.shape == (50, width)
    assert np.isfinite(scores.numpy()).all()
    assert all(len(set(found)) == width for found in rows.numpy())
    true = np.take_along_axis(queries @ embeddings.T, rows.numpy(), axis=1)
    np.testing.assert_allclose(scores.numpy(), true, atol=1e-5 if bits == 32 else 0.05)
    if count >= 1000 and bits == 32:
        # Effort has grown to all leaves and an exact score of all candidates.
        best = -np.sort(-(queries @ embeddings.T), axis=1)[:, :width]
        np.testing.assert_allclose(scores.numpy(), best, atol=1e-5)


@pytest.mark.parametrize("bits", [32, 8])
def test_what_a_query_finds_is_up_to_itself(tree, tiny, bits):
    """Whatever the others want, and whether their leaves hold enough or all have to be searched."""
    embeddings, queries, _ = tree
    state = train(embeddings, Structure("tree", 63, 2.0))
    effort = Effort(k=60, num_leaves=63, leaves_to_search=1, reorder=60)
    index = ScannIndex(state if bits == 32 else reordering_int8(state), 4000, effort)
    counts = np.random.default_rng(4).choice([1, 30, 60, 61, 90, 400], 50).astype(np.int32)
    ask = tf.function(index.search, reduce_retracing=True)
    together = [found.numpy() for found in ask(tf.constant(queries), tf.constant(counts))]
    assert together[0].shape == (50, 400)
    assert (np.isfinite(together[1]) == (np.arange(400) < counts[:, np.newaxis])).all()
    for size in (1, 7, 20):
        for start in range(0, 50, size):
            few = slice(start, start + size)
            found = ask(tf.constant(queries[few]), tf.constant(counts[few]))
            for part, whole in zip(found, together, strict=True):
                np.testing.assert_array_equal(part, whole[few, : counts[few].max()])
    # One leaf was enough for some, and not for others of the same count.
    missed = [
        len(set(exact) - set(rows[:60]))
        for exact, rows in zip(
            tiny.exact_rows(embeddings, queries[counts == 60], 60),
            together[0][counts == 60].tolist(),
            strict=True,
        )
    ]
    assert max(missed) > 20
    assert min(missed) <= (0 if bits == 32 else 6)


def test_a_query_that_is_no_number_leaves_the_others_their_answers(tree):
    embeddings, queries, _ = tree
    state = train(embeddings, Structure("tree", 63, 2.0))
    index = ScannIndex(state, 4000, Effort(k=20, num_leaves=63, leaves_to_search=1, reorder=20))
    counts = tf.fill([8], 300)
    expected = [found.numpy() for found in index.search(tf.constant(queries[:8]), counts)]
    broken = queries[:8].copy()
    broken[3] = np.nan
    found = [part.numpy() for part in index.search(tf.constant(broken), counts)]
    others = np.arange(8) != 3
    for part, whole in zip(found, expected, strict=True):
        np.testing.assert_array_equal(part[others], whole[others])
    assert np.isnan(found[1][3]).all()


@pytest.mark.parametrize("kind", [ExactIndex, ScannIndex])
def test_small_corpora(kind, tiny):
    embeddings = tiny.clustered(3, 1)
    made = ExactIndex(embeddings) if kind is ExactIndex else brute_force(embeddings, 1)
    for batch in (0, 1, 2):
        rows, scores = made.search(tf.constant(embeddings[:batch]), tf.constant(7))
        assert rows.dtype == tf.int32
        if batch:
            expected = tiny.exact_rows(embeddings, embeddings[:batch], 3)
            assert rows.numpy().tolist() == expected.tolist()
            assert scores.shape == (batch, 3)


def test_two_indexes_in_one_process_do_not_share_a_searcher(tiny, tmp_path):
    loaded = []
    for seed in (1, 2):
        embeddings = tiny.clustered(30, seed)
        made = brute_force(embeddings, 3)
        spec = [tf.TensorSpec([None, DIM]), tf.TensorSpec([], tf.int32)]
        made.ask = tf.function(made.search, input_signature=spec)
        options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
        tf.saved_model.save(made, str(tmp_path / str(seed)), options=options)
        loaded.append((embeddings, tf.saved_model.load(str(tmp_path / str(seed)))))

    for embeddings, model in loaded:
        rows, _ = model.ask(tf.constant(embeddings), tf.constant(1))
        expected = tiny.exact_rows(embeddings, embeddings, 1)
        assert rows.numpy().tolist() == expected.tolist()
