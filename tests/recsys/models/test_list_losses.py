import numpy as np
import tensorflow as tf

from recsys.models.list_losses import ListSoftmax, PairLogistic


def test_list_softmax_by_hand():
    loss = ListSoftmax(reduction="none")
    logits = tf.constant([[0.0, 0.0, -1e9], [1.0, 0.0, 0.0]])
    labels = tf.constant([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(loss(labels, logits).numpy(), [np.log(2), 0], rtol=1e-6)


def test_pair_logistic_by_hand():
    loss = PairLogistic(reduction="none")
    logits = np.array([[2.0, 0.5, -1.0, -1e9], [1.0, 0.0, 3.0, 0.0]], np.float32)
    labels = np.array([[1.0, 0.0, 0.0, -1.0], [1.0, 1.0, 0.0, 0.0]], np.float32)
    differences = [2.0 - 0.5, 2.0 + 1.0], [1.0 - 3.0, 1.0 - 0.0, 0.0 - 3.0, 0.0 - 0.0]
    expected = [np.mean(np.log1p(np.exp(-np.array(d)))) for d in differences]
    np.testing.assert_allclose(loss(labels, logits).numpy(), expected, rtol=1e-6)
    # Weights are those of requests.
    weighed = PairLogistic(reduction="sum")(labels, logits, np.array([1.0, 3.0], np.float32))
    np.testing.assert_allclose(weighed.numpy(), expected[0] + 3 * expected[1], rtol=1e-6)


def test_a_request_without_a_pair_has_neither_loss_nor_gradient():
    labels = tf.constant([[1.0, 1.0, -1.0], [0.0, 0.0, 0.0]])
    logits = tf.Variable([[0.0, 5.0, -1e9], [1.0, 2.0, 3.0]])
    with tf.GradientTape() as tape:
        loss = PairLogistic(reduction="sum")(labels, logits)
    assert float(loss) == 0.0
    assert not tape.gradient(loss, logits).numpy().any()
