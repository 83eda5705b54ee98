import numpy as np
import tensorflow as tf

from recsys.models.dropout import Dropouts


def test_dropout_depends_on_the_step_alone():
    step = tf.Variable(7, dtype=tf.int64)
    dropout = Dropouts(0.5, seed=1, step=step)()
    ones = tf.ones([10, 10])
    first = dropout(ones, training=True).numpy()
    np.testing.assert_array_equal(first, dropout(ones, training=True))
    step.assign_add(1)
    assert not np.array_equal(first, dropout(ones, training=True))
    np.testing.assert_array_equal(dropout(ones, training=False), ones)
    assert set(np.unique(first)) == {0.0, 2.0}


def test_every_place_has_a_mask_of_its_own():
    dropouts = Dropouts(0.5, seed=1, step=tf.Variable(0, dtype=tf.int64))
    ones = tf.ones([10, 10])
    first, second = dropouts()(ones, training=True), dropouts()(ones, training=True)
    assert not np.array_equal(first, second)
    assert not dropouts(0.0).dropped(tf.constant([100]), training=True).numpy().any()
    dropped = dropouts(0.3).dropped(tf.constant([10_000]), training=True).numpy()
    assert 0.27 < dropped.mean() < 0.33
