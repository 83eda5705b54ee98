import numpy as np
import pytest
import tensorflow as tf

from recsys import config
from recsys.artifacts import ArtifactError
from serving_export import index
from serving_export.index import ExactIndex, ScannIndex, build

DIM = 16


def clustered(rows: int, seed: int, clusters: int = 100) -> np.ndarray:
    """Unit vectors around centres that every seed shares."""
    centres = np.random.default_rng(0).normal(size=(clusters, DIM))
    random = np.random.default_rng(seed)
    points = centres[random.integers(0, clusters, rows)] + 0.5 * random.normal(size=(rows, DIM))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def target(min_recall: float, k: int = 20) -> config.Index:
    return config.Index(min_recall=min_recall, k=k)


def exact_rows(embeddings, queries, k):
    return np.argsort(-(queries @ embeddings.T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize(
    ("num_candidates", "kind"), [(300, "brute_force"), (25_000, "hashed"), (110_000, "tree")]
)
def test_kind_follows_size_and_recall_is_what_a_count_of_ids_says(num_candidates, kind):
    embeddings, queries = clustered(num_candidates, 1), clustered(100, 2)

    made, report = build(embeddings, queries, target(0.9))

    assert report.kind == kind
    assert report.k == 20
    assert report.recall >= 0.9
    rows, _ = made.search(tf.constant(queries), tf.constant(20))
    expected = exact_rows(embeddings, queries, 20)
    shared = [len(set(a) & set(b)) / 20 for a, b in zip(rows.numpy(), expected, strict=True)]
    assert len(shared) == 100
    assert np.mean(shared) == pytest.approx(report.recall, abs=0.01)
    assert report.bytes >= embeddings.nbytes
    assert report.milliseconds_per_query > 0
    assert report.parameters.get("num_leaves", 0) == {"tree": 331, "hashed": 1}.get(kind, 0)


@pytest.fixture(scope="module")
def small_tree():
    """A tree over few candidates: the sizes at which kinds change are lowered for the test."""
    embeddings, queries = clustered(4000, 1), clustered(50, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_BRUTE_FORCE_BELOW", 10)
        patch.setattr(index, "_HASHED_BELOW", 20)
        made, report = build(embeddings, queries, target(0.9, k=10))
        again, _ = build(embeddings, queries, target(0.9, k=10))
    return embeddings, queries, made, again, report


def test_higher_target_searches_harder(small_tree, monkeypatch):
    embeddings, queries, _, _, report = small_tree
    monkeypatch.setattr(index, "_BRUTE_FORCE_BELOW", 10)
    monkeypatch.setattr(index, "_HASHED_BELOW", 20)

    _, lower = build(embeddings, queries, target(0.3, k=10))

    assert lower.parameters["leaves_to_search"] < report.parameters["leaves_to_search"]
    assert 0.3 <= lower.recall < 0.9 <= report.recall


def test_equal_embeddings_give_an_equal_index(small_tree):
    _, _, made, again, _ = small_tree
    tensors = list(zip(made.variables, again.variables, strict=True))
    assert len(tensors) == 9
    for one, other in tensors:
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.parametrize("count", [1, 10, 1000, 4000, 9000])
def test_tree_finds_as_many_as_asked_for(small_tree, count):
    embeddings, queries, made, _, _ = small_tree

    rows, scores = made.search(tf.constant(queries), tf.constant(count))

    width = min(count, 4000)
    assert rows.shape == scores.shape == (50, width)
    assert np.isfinite(scores.numpy()).all()
    assert all(len(set(found)) == width for found in rows.numpy())
    true = np.take_along_axis(queries @ embeddings.T, rows.numpy(), axis=1)
    np.testing.assert_allclose(scores.numpy(), true, atol=1e-5)
    if count >= 1000:  # effort has grown to all leaves and an exact score of all candidates
        best = -np.sort(-(queries @ embeddings.T), axis=1)[:, :width]
        np.testing.assert_allclose(scores.numpy(), best, atol=1e-5)


def test_refuses_what_it_cannot_reach(small_tree, monkeypatch):
    embeddings, queries, *_ = small_tree
    monkeypatch.setattr(index, "_BRUTE_FORCE_BELOW", 10)
    monkeypatch.setattr(index, "_HASHED_BELOW", 20)
    monkeypatch.setattr(index, "_STEPS", ((0.05, 1), (0.1, 1)))

    with pytest.raises(ArtifactError, match=r"recall@10 0\.\d+, export.index.min_recall asks for"):
        build(embeddings, queries, target(1.0, k=10))


@pytest.mark.parametrize("kind", [ExactIndex, ScannIndex])
def test_small_corpora(kind):
    embeddings = clustered(3, 1)
    scann, _ = build(embeddings, embeddings, target(1))
    made = ExactIndex(embeddings) if kind is ExactIndex else scann
    for batch in (0, 1, 2):
        rows, scores = made.search(tf.constant(embeddings[:batch]), tf.constant(7))
        assert rows.dtype == tf.int32
        if batch:
            assert rows.numpy().tolist() == exact_rows(embeddings, embeddings[:batch], 3).tolist()
            assert scores.shape == (batch, 3)


def test_two_indexes_in_one_process_do_not_share_a_searcher(tmp_path):
    loaded = []
    for seed in (1, 2):
        embeddings = clustered(30, seed)
        made, _ = build(embeddings, embeddings, target(1, k=3))
        spec = [tf.TensorSpec([None, DIM]), tf.TensorSpec([], tf.int32)]
        made.ask = tf.function(made.search, input_signature=spec)
        options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
        tf.saved_model.save(made, str(tmp_path / str(seed)), options=options)
        loaded.append((embeddings, tf.saved_model.load(str(tmp_path / str(seed)))))

    for embeddings, model in loaded:
        rows, _ = model.ask(tf.constant(embeddings), tf.constant(1))
        assert rows.numpy().ravel().tolist() == list(range(30))
