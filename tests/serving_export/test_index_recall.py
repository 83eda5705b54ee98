import numpy as np
import pytest

from serving_export import index_recall
from serving_export.index import Effort
from serving_export.index_recall import halves, measure
from serving_export.searcher import Structure, reordering_int8, restored, search, train


@pytest.fixture(scope="module")
def corpus(tiny):
    return tiny.clustered(2000, 1)


@pytest.mark.parametrize("rounded", [False, True])
def test_recall_is_what_a_count_of_ids_says(corpus, tiny, rounded):
    queries = tiny.clustered(240, 2)
    _, sample = halves(corpus, queries, 10)
    state = train(corpus, Structure("tree", 40, 2.0))
    with restored(reordering_int8(state) if rounded else state) as handle:
        recalls, milliseconds = measure(handle, Effort(10, 40, 4, 20), sample)
        rows, _ = search(handle, queries[120:], 10, 20, 4)

    expected = tiny.exact_rows(corpus, queries[120:], 10)
    counted = [len(set(a) & set(b)) / 10 for a, b in zip(rows.numpy(), expected, strict=True)]
    assert 0.3 < np.mean(counted) < 0.99
    np.testing.assert_allclose(recalls, counted, atol=1e-6)
    assert milliseconds > 0


def test_places_that_stay_empty_are_misses(corpus, tiny):
    """A leaf holds fewer than 300 of 2000."""
    sample, _ = halves(corpus, tiny.clustered(20, 2), 300)
    with restored(train(corpus, Structure("tree", 40, 2.0))) as handle:
        recalls, _ = measure(handle, Effort(300, 40, 1, 2000), sample)
    assert recalls.shape == (10,)
    assert (recalls < 0.9).all()
    assert (recalls > 0).any()


@pytest.mark.parametrize("k", [1, 10, 2000])
def test_the_exact_are_found_by_parts_of_the_corpus(corpus, tiny, monkeypatch, k):
    """Of which the last is smaller than k."""
    monkeypatch.setattr(index_recall, "_ROWS", 999)
    queries = tiny.clustered(120, 2)
    expected = np.sort(queries @ corpus.T, axis=1)[:, -k]
    for sample, part in zip(halves(corpus, queries, k), np.split(expected, 2), strict=True):
        np.testing.assert_allclose(sample.kth_best, part, rtol=1e-5, atol=1e-5)


def test_one_query_has_to_do_both(corpus):
    tuning, reported = halves(corpus, corpus[:1], 5)
    assert tuning is reported
    assert len(reported.queries) == 1


def test_long_vectors_are_found_in_spite_of_their_rounding(corpus, tiny):
    sample, _ = halves(1000 * corpus, 1000 * tiny.clustered(100, 2), 10)
    with restored(train(1000 * corpus, Structure("brute_force"))) as handle:
        recalls, _ = measure(handle, Effort(10, 1, 1, 2000), sample)
    assert (recalls == 1).all()
