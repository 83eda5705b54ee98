import numpy as np
import pytest
import tensorflow as tf

from recsys import list_config
from serving_export.diversity import Diversity, follows

NUM_ITEMS, DIM = 60, 4


def by_hand(settings, scores, embeddings, k):
    """Positions of one list in the order of MMR, by loops; then what is behind the pool."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    pool = [n for n in range(min(settings.pool, len(scores))) if np.isfinite(scores[n])]
    span = scores[pool[0]] - scores[pool[-1]] if pool else 0
    chosen = []
    for _ in range(min(k, len(pool))):
        values = {
            n: settings.relevance * (scores[n] - scores[pool[-1]]) / (span or 1)
            - (1 - settings.relevance) * max((unit[n] @ unit[m] for m in chosen), default=0)
            for n in pool
            if n not in chosen
        }
        chosen.append(max(values, key=values.get))
    return (chosen + [n for n in range(len(scores)) if n not in chosen])[:k]


@pytest.fixture(scope="module")
def lists():
    """Embeddings, and lists of 20 sorted scores, of which some places are empty."""
    random = np.random.default_rng(1)
    embeddings = random.normal(size=(NUM_ITEMS, DIM)).astype(np.float32)
    rows = np.stack([random.permutation(NUM_ITEMS)[:20] for _ in range(12)]).astype(np.int32)
    scores = -np.sort(-random.normal(size=rows.shape)).astype(np.float32)
    scores[0] = -np.inf
    scores[1, 3:] = -np.inf
    scores[2] = 0.5
    return embeddings, rows, scores


@pytest.mark.parametrize("relevance", [0.0, 0.3, 1.0])
def test_the_graph_chooses_as_loops_do(lists, relevance):
    """Behind a pool of eight the order stays; with relevance alone it stays everywhere."""
    embeddings, rows, scores = lists
    settings = list_config.Diversity(relevance=relevance, pool=8)
    arranged = tf.function(Diversity(settings, tf.Variable(embeddings)).arranged)
    for k in (0, 1, 6, 15):
        found, theirs = (part.numpy() for part in arranged(rows, scores, tf.constant(k)))
        assert found.shape == rows.shape
        for n in range(len(rows)):
            order = by_hand(settings, scores[n], embeddings[rows[n]], k)
            assert found[n, :k].tolist() == rows[n, order].tolist()
            np.testing.assert_array_equal(theirs[n, :k], scores[n, order])
            assert sorted(found[n]) == sorted(rows[n])
            if relevance == 1:
                assert order == list(range(k))


def test_the_check_takes_the_right_answer_alone(lists):
    embeddings, rows, scores = lists
    whole = np.full((len(rows), NUM_ITEMS), -np.inf, np.float32)
    np.put_along_axis(whole, rows, scores, axis=1)
    settings = list_config.Diversity(relevance=0.5, pool=8)
    orders = [by_hand(settings, scores[n], embeddings[rows[n]], 12) for n in range(len(rows))]
    answer = np.take_along_axis(rows, np.array(orders), axis=1)
    answer[~np.isfinite(np.take_along_axis(whole, answer, axis=1))] = -1
    certain = np.arange(len(rows)) != 2  # one query's scores are equal: any pool will do
    assert follows(settings, whole, embeddings, answer)[certain].all()
    by_score = np.where(np.isfinite(scores), rows, -1)[:, :12]
    assert follows(settings, whole, embeddings, by_score)[certain].mean() < 0.9
    twice = answer.copy()
    twice[:, 1] = twice[:, 0]
    assert not follows(settings, whole, embeddings, twice)[3:, 1].any()
    missing = answer.copy()
    missing[:, 11] = -1
    assert not follows(settings, whole, embeddings, missing)[3:, 11].any()
