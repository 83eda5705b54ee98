import pytest
import tensorflow as tf

from recsys.models.precision import mixed_precision


def test_layers_made_within_compute_in_half_precision_over_whole_variables():
    with mixed_precision(True):
        layer = tf.keras.layers.Dense(3)
    assert layer(tf.ones([2, 4])).dtype == tf.bfloat16
    assert {variable.dtype for variable in layer.variables} == {tf.float32}
    assert tf.keras.layers.Dense(3)(tf.ones([2, 4])).dtype == tf.float32


def test_what_fails_within_leaves_nothing_behind():
    with pytest.raises(ValueError, match="out"), mixed_precision(True):
        raise ValueError("out")
    assert tf.keras.mixed_precision.global_policy().name == "float32"


def test_it_is_off_unless_asked_for():
    with mixed_precision(False):
        assert tf.keras.layers.Dense(3)(tf.ones([2, 4])).dtype == tf.float32
