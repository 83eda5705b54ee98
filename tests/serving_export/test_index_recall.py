import numpy as np
import pytest

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


def test_one_query_has_to_do_both(corpus):
    tuning, reported = halves(corpus, corpus[:1], 5)
    assert tuning is reported
    assert len(reported.queries) == 1


def test_long_vectors_are_found_in_spite_of_their_rounding(corpus, tiny):
    sample, _ = halves(1000 * corpus, 1000 * tiny.clustered(100, 2), 10)
    with restored(train(1000 * corpus, Structure("brute_force"))) as handle:
        recalls, _ = measure(handle, Effort(10, 1, 1, 2000), sample)
    assert (recalls == 1).all()
