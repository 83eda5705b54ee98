import numpy as np
import pytest
import tensorflow as tf

from recsys.losses import FullSoftmax, SampledSoftmax


def unit(rng, rows, dim=8):
    return tf.math.l2_normalize(tf.constant(rng.normal(size=(rows, dim)), tf.float32), axis=-1)


def test_full_softmax_is_the_cross_entropy_over_all_items():
    rng = np.random.default_rng(0)
    queries, items = unit(rng, 4), unit(rng, 9)
    labels = np.array([0, 3, 8, 3])
    logits = (queries.numpy() @ items.numpy().T) / 0.5
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    weight = np.array([1.0, 2.0, 0.5, 0.0], np.float32)
    expected = -(weight * logp[np.arange(4), labels]).mean()
    loss = FullSoftmax(temperature=0.5)(queries, items, tf.constant(labels), weight)
    assert loss.numpy() == pytest.approx(expected, rel=1e-5)


def test_sampled_softmax_by_hand_with_an_accidental_hit():
    queries = tf.constant([[1.0, 0.0], [0.0, 1.0]])
    candidates = tf.constant([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    ids = tf.constant([5, 6, 5])  # the extra negative is the label of query 0
    draws = tf.math.log(tf.constant([0.5, 0.25, 0.5]))
    loss = SampledSoftmax(temperature=1.0)(queries, candidates, ids, draws)
    one = -np.log(np.e / 0.5 / (np.e / 0.5 + 1 / 0.25))
    two = -np.log(np.e / 0.25 / (np.e / 0.25 + 1 / 0.5 + 1 / 0.5))
    assert loss.numpy() == pytest.approx((one + two) / 2, rel=1e-5)


def test_the_correction_makes_samples_an_unbiased_view_of_the_corpus():
    """With every item drawn about as often as expected, sampled and full softmax agree."""
    rng = np.random.default_rng(1)
    items, queries = unit(rng, 20), unit(rng, 1)
    share = rng.dirichlet(np.ones(20)).astype(np.float32)
    labels = np.array([3])
    full = FullSoftmax(temperature=0.2)(queries, items, tf.constant(labels)).numpy()
    drawn = rng.choice(20, 200_000, p=share / share.sum())
    drawn = drawn[drawn != 3]
    rows = np.concatenate([labels, drawn])
    log_draws = np.log(share[rows] * 200_000)
    log_draws[0] = 0  # the label stands once, for sure
    loss = SampledSoftmax(temperature=0.2)(
        queries, tf.gather(items, rows), tf.constant(rows), tf.constant(log_draws, tf.float32)
    )
    assert loss.numpy() == pytest.approx(full, rel=0.02)


def test_tiny_probabilities_are_not_clipped():
    """A catalogue of a hundred million items has probabilities of 1e-8; TFRS clips at 1e-6."""
    queries, candidates = tf.ones([1, 2]), tf.ones([2, 2])
    ids = tf.constant([0, 1])
    loss = SampledSoftmax(temperature=1.0)
    rare = loss(queries, candidates, ids, tf.math.log(tf.constant([1.0, 1e-8])))
    rarer = loss(queries, candidates, ids, tf.math.log(tf.constant([1.0, 1e-9])))
    assert rarer.numpy() - rare.numpy() == pytest.approx(np.log(10), rel=1e-3)
