"""What every history encoder must hold to."""

import numpy as np
import pytest
import tensorflow as tf

from recsys.model_config import HistoryEncoder
from recsys.models.dropout import Dropouts
from recsys.models.encoders import MeanEncoder, history_encoder
from recsys.models.precision import mixed_precision

DIM, LENGTH = 8, 6


def events(seed, batch=3):
    return tf.random.stateless_normal([batch, LENGTH, DIM], [seed, 2])


@pytest.fixture(params=["mean", "gru", "lstm", "attention"])
def kind(request):
    return request.param


@pytest.fixture
def encoder(kind):
    return learned(kind)


def learned(kind):
    tf.keras.utils.set_random_seed(3)
    dropouts = Dropouts(0.3, seed=1, step=tf.Variable(0, dtype=tf.int64))
    config = HistoryEncoder(kind=kind, num_blocks=2, salience=True)
    layer = history_encoder(config, DIM, LENGTH, dropouts)
    layer(events(1))
    # What is learned starts at zero; here it has been learned.
    draw = np.random.default_rng(5).normal
    layer.set_weights([0.3 * draw(size=weight.shape) for weight in layer.get_weights()])
    return layer


def test_a_later_event_changes_no_earlier_position(encoder):
    sequence = events(1)
    changed = tf.concat([sequence[:, :4], events(9)[:, 4:]], axis=1)
    before, after = encoder(sequence).numpy(), encoder(changed).numpy()
    np.testing.assert_allclose(before[:, :4], after[:, :4], rtol=1e-5, atol=1e-6)
    assert not np.allclose(before[:, 4:], after[:, 4:])


def test_earlier_events_count(encoder):
    sequence = events(1)
    changed = tf.concat([events(9)[:, :1], sequence[:, 1:]], axis=1)
    assert not np.allclose(encoder(sequence)[:, -1], encoder(changed)[:, -1], atol=1e-4)


def test_padding_at_the_end_and_other_rows_change_nothing(encoder):
    sequence = events(1)
    whole = encoder(sequence).numpy()
    np.testing.assert_allclose(encoder(sequence[:, :3]), whole[:, :3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encoder(sequence[:1]), whole[:1], rtol=1e-4, atol=1e-5)


def test_training_drops_and_serving_does_not(encoder):
    sequence = events(1)
    np.testing.assert_array_equal(encoder(sequence), encoder(sequence, training=False))
    assert not np.allclose(encoder(sequence), encoder(sequence, training=True))


def test_half_precision_is_close_and_learns_as_much(kind, encoder):
    with mixed_precision(True):
        half = learned(kind)
    sequence = events(1)
    with tf.GradientTape() as tape:
        encoded = half(sequence)
        total = tf.reduce_sum(tf.square(tf.cast(encoded, tf.float32)))
    assert encoded.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.cast(encoded, tf.float32), encoder(sequence), atol=0.1)
    for gradient in tape.gradient(total, half.trainable_variables):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


def test_pools_of_the_mean_start_near_the_last_event_and_near_the_mean():
    layer = MeanEncoder(True, DIM, LENGTH, Dropouts(0.0, 1, tf.Variable(0, dtype=tf.int64)))
    layer(events(1))
    layer.set_weights([w * 0 if w.shape == (2 * DIM, DIM) else w for w in layer.get_weights()])
    sequence = events(1)
    state, mean = layer(sequence).numpy(), np.asarray(sequence).mean(axis=1)
    recent = 2 * state[:, -1] - mean
    weights = np.exp(-np.arange(LENGTH)[::-1])
    expected = np.einsum("l,bld->bd", weights / weights.sum(), sequence)
    np.testing.assert_allclose(recent, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state[:, 0], sequence[:, 0], rtol=1e-5, atol=1e-6)
