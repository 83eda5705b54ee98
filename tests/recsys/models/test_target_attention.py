import numpy as np
import pytest
import tensorflow as tf

from recsys.models.target_attention import TargetAttention


@pytest.fixture
def attention():
    tf.keras.utils.set_random_seed(1)
    return TargetAttention(8)


def ask(attention, candidates, events, same, known):
    inputs = [tf.constant(t, tf.float32) for t in (candidates, events, same)]
    return attention(*inputs, tf.cast(known, tf.bool)).numpy()


def test_it_is_a_network_over_event_candidate_and_product(attention):
    random = np.random.default_rng(2)
    candidates, events = random.normal(size=(1, 2, 3)), random.normal(size=(1, 4, 3))
    same = np.zeros((1, 2, 4))
    same[0, 1, 2] = 1
    found = ask(attention, candidates, events, same, np.ones((1, 4)))
    kernels = [w.numpy() for w in attention.trainable_weights]
    event, bias, candidate, product, flag, out, out_bias = kernels
    for c in range(2):
        expected = np.zeros(3)
        for j in range(4):
            e, v = events[0, j], candidates[0, c]
            hidden = e @ event + bias + v @ candidate + (e * v) @ product + same[0, c, j] * flag[0]
            expected += (np.maximum(hidden, 0) @ out + out_bias)[0] * e
        np.testing.assert_allclose(found[0, c], expected, rtol=1e-4)


def test_padding_says_nothing(attention):
    random = np.random.default_rng(3)
    candidates, events = random.normal(size=(2, 5, 3)), random.normal(size=(2, 4, 3))
    known = [[1, 1, 0, 0], [0, 0, 0, 0]]
    whole = ask(attention, candidates, events, np.zeros((2, 5, 4)), known)
    other = events.copy()
    other[0, 2:] = 7
    np.testing.assert_array_equal(
        whole[0], ask(attention, candidates, other, np.zeros((2, 5, 4)), known)[0]
    )
    assert not whole[1].any()
    short = ask(attention, candidates[:1], events[:1, :2], np.zeros((1, 5, 2)), [[1, 1]])
    np.testing.assert_allclose(short[0], whole[0], rtol=1e-5)
