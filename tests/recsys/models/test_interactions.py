import numpy as np
import tensorflow as tf

from recsys.models.interactions import CrossLayers, DotProducts
from recsys.ranking_config import Ranking


def parts():
    random = np.random.default_rng(1)
    return [tf.constant(random.normal(size=(2, 3, n)), tf.float32) for n in (5, 4, 7)]


def test_dot_products_are_those_of_the_pairs():
    layer = DotProducts(Ranking(bottom=(6, 4)))
    found = layer(parts()).numpy()
    numbers, *vectors = parts()
    for dense in layer._bottom:
        numbers = dense(numbers)
    projected = [vector @ p.kernel for vector, p in zip(vectors, layer._projections, strict=True)]
    every = np.stack([numbers, *projected], axis=2)
    products = np.einsum("bcid,bcjd->bcij", every, every) / 2
    np.testing.assert_allclose(found[..., :4], numbers, rtol=1e-5)
    below = np.tril(np.ones((3, 3)), -1)
    np.testing.assert_allclose(
        found[..., 4:], (products * below).reshape(2, 3, 9), rtol=1e-4, atol=1e-6
    )


def test_all_of_its_weights_are_learned():
    layer = DotProducts(Ranking(bottom=(6, 4)))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(parts()) ** 2)
    gradients = tape.gradient(loss, layer.trainable_weights)
    # Two bottom layers, a projection for each of the two vectors.
    assert len(gradients) == 6
    assert all(np.abs(g.numpy()).max() > 0 for g in gradients)


def test_numbers_alone_have_no_pair():
    numbers = parts()[:1]
    found = DotProducts(Ranking(bottom=(4,)))(numbers).numpy()
    assert found.shape == (2, 3, 5)
    assert not found[..., 4].any()


def test_cross_layers_keep_the_columns():
    crossed = CrossLayers(Ranking(cross_layers=2, cross_rank=2))(parts())
    assert crossed.shape == (2, 3, 16)
    same = CrossLayers(Ranking(cross_layers=0))(parts())
    np.testing.assert_array_equal(same, tf.concat(parts(), axis=-1))
