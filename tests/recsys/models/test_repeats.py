import numpy as np
import tensorflow as tf

from recsys.models.repeats import RepeatScores


def test_scores_depend_on_recency_and_event_and_end_with_what_is_known():
    layer = RepeatScores(length=4)
    events = tf.random.stateless_normal([2, 4, 3], [1, 2])
    sequence, known = tf.constant([0, 0, 1]), tf.constant([4, 2, 0])
    assert not layer(events, sequence, known).numpy().any(), "nothing is added before training"
    recency, salience = np.arange(1.0, 5.0), np.ones((3, 1))
    by_shape = {(3, 1): salience, (4,): recency}
    layer.set_weights([by_shape[tuple(weight.shape)] for weight in layer.weights])
    found = layer(events, sequence, known).numpy()
    total = events.numpy()[0].sum(axis=1)
    np.testing.assert_allclose(found[0], np.arange(4, 0, -1) + total, rtol=1e-5)
    np.testing.assert_allclose(found[1, :2], np.arange(2, 0, -1) + total[:2], rtol=1e-5)
    assert not found[1, 2:].any()
    assert not found[2].any()
