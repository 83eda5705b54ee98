import numpy as np
import pytest
import tensorflow as tf

from recsys.models.towers import HistoryPool, StatelessDropout

PADDED = tf.constant([[True, True, True, False], [False] * 4, [True, False, False, False]])


@pytest.fixture
def pool():
    layer = HistoryPool()
    layer(tf.zeros([1, 4, 2]), mask=tf.zeros([1, 4], tf.bool))
    return layer


def test_pools_start_near_the_last_event_and_near_the_mean(pool):
    sequence = tf.constant(np.arange(24, dtype=np.float32).reshape(3, 4, 2))
    recent, mean = np.split(pool(sequence, mask=PADDED).numpy(), 2, axis=1)
    np.testing.assert_allclose(mean[0], sequence[0, :3].numpy().mean(axis=0), rtol=1e-6)
    last, first = sequence[0, 2].numpy(), sequence[0, 0].numpy()
    assert (np.abs(recent[0] - last) < np.abs(recent[0] - first)).all()


def test_empty_history_gives_zeros_and_one_event_itself(pool):
    sequence = tf.random.stateless_normal([3, 4, 2], [1, 2])
    pooled = pool(sequence, mask=PADDED).numpy()
    assert pooled[1].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(pooled[2], np.tile(sequence[2, 0].numpy(), 2), rtol=1e-6)


def test_padding_changes_nothing(pool):
    sequence = tf.random.stateless_normal([3, 4, 2], [3, 4])
    garbage = tf.where(PADDED[..., None], sequence, 1e6)
    np.testing.assert_allclose(pool(sequence, mask=PADDED), pool(garbage, mask=PADDED), rtol=1e-6)


def test_order_matters_to_the_recent_pool_alone(pool):
    sequence = tf.random.stateless_normal([1, 4, 2], [5, 6])
    mask = tf.ones([1, 4], tf.bool)
    forward, backward = pool(sequence, mask=mask), pool(sequence[:, ::-1], mask=mask)
    np.testing.assert_allclose(forward[:, 2:], backward[:, 2:], rtol=1e-5)
    assert not np.allclose(forward[:, :2], backward[:, :2])


def test_dropout_depends_on_the_step_alone():
    step = tf.Variable(7, dtype=tf.int64)
    dropout = StatelessDropout(0.5, seed=1, step=step)
    ones = tf.ones([10, 10])
    first = dropout(ones, training=True).numpy()
    np.testing.assert_array_equal(first, dropout(ones, training=True))
    step.assign_add(1)
    assert not np.array_equal(first, dropout(ones, training=True))
    np.testing.assert_array_equal(dropout(ones, training=False), ones)
    assert set(np.unique(first)) == {0.0, 2.0}
