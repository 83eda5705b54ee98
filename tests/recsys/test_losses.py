import numpy as np
import pytest
import tensorflow as tf

from recsys.losses import Sampling, Seen, Softmax, _tile

QUERIES = 300  # more than a tile


def unit(rng, rows, dim=8):
    return tf.math.l2_normalize(tf.constant(rng.normal(size=(rows, dim)), tf.float32), axis=-1)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, QUERIES).astype(np.int32)
    weight = rng.random(QUERIES).astype(np.float32)
    return unit(rng, QUERIES), unit(rng, 9), tf.constant(labels), tf.constant(weight)


def plain(queries, items, labels, weight, bias=0.0, allowed=None):
    """The same loss with all logits at once, as TensorFlow writes it."""
    logits = tf.matmul(queries, items, transpose_b=True) / 0.5 + bias
    if allowed is not None:
        logits = tf.where(allowed, logits, -1e9)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    return tf.reduce_mean(losses * weight)


def value_and_gradients(loss, queries, items):
    with tf.GradientTape() as tape:
        tape.watch([queries, items])
        value = 3.0 * loss(queries, items)
    return value, tape.gradient(value, [queries, items])


def assert_same(ours, reference, queries, items, atol=1e-6):
    value, gradients = value_and_gradients(ours, queries, items)
    expected, expected_gradients = value_and_gradients(reference, queries, items)
    assert value.numpy() == pytest.approx(expected.numpy(), rel=max(1e-5, atol))
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=atol)


def test_over_all_items_it_is_the_cross_entropy_with_its_gradients(batch):
    queries, items, labels, weight = batch
    softmax = Softmax(temperature=0.5)
    assert_same(
        lambda q, c: softmax(q, c, labels, sample_weight=weight),
        lambda q, c: plain(q, c, labels, weight),
        queries,
        items,
    )


def test_log_probabilities_of_negatives_are_subtracted_and_never_clipped(batch):
    """A catalogue of a hundred million items has probabilities of 1e-8; TFRS clips at 1e-6."""
    queries, items, labels, weight = batch
    log_probability = tf.math.log(tf.constant([1e-9, 1e-8, *[0.1] * 7]))
    softmax = Softmax(temperature=0.5)
    assert_same(
        lambda q, c: softmax(q, c, labels, weight, Sampling(log_probability)),
        lambda q, c: plain(
            q, c, labels, weight, bias=-log_probability * (1 - tf.one_hot(labels, 9))
        ),
        queries,
        items,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        lambda rows: {"seen": Seen(rows)},
        lambda rows: {"sampling": Sampling(tf.zeros([9]), related=rows)},
    ],
    ids=["seen and excluded", "there because of the query"],
)
def test_listed_candidates_are_no_negatives_but_the_label_stays(batch, arguments):
    queries, items, labels, weight = batch
    listed = tf.stack([labels, (labels + 1) % 9, tf.fill([QUERIES], -1)], axis=1)
    allowed = tf.logical_not(tf.one_hot((labels + 1) % 9, 9, on_value=True, off_value=False))
    softmax = Softmax(temperature=0.5)
    assert_same(
        lambda q, c: softmax(q, c, labels, weight, **arguments(listed)),
        lambda q, c: plain(q, c, labels, weight, allowed=allowed),
        queries,
        items,
    )


def test_scores_of_seen_items_are_added_and_learned(batch):
    """An item that was seen twice gets both scores; -1 is no item."""
    queries, items, labels, weight = batch
    twice = (labels + 1) % 9
    seen = tf.stack([labels, twice, twice, tf.fill([QUERIES], -1)], axis=1)
    scores = tf.random.stateless_normal([QUERIES, 4], [1, 2])

    def reference(scores):
        once = tf.one_hot(labels, 9) * scores[:, :1]
        both = tf.one_hot(twice, 9) * (scores[:, 1:2] + scores[:, 2:3])
        return plain(queries, items, labels, weight, bias=(once + both) / 0.5)

    softmax = Softmax(temperature=0.5)
    results = []
    for loss in (lambda s: softmax(queries, items, labels, weight, seen=Seen(seen, s)), reference):
        with tf.GradientTape() as tape:
            tape.watch(scores)
            value = loss(scores)
        results.append((value.numpy(), tape.gradient(value, scores).numpy()))
    (ours, gradient), (expected, wanted) = results
    assert ours == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, wanted, atol=1e-7)
    assert not gradient[:, 3].any()


def test_only_the_hardest_negatives_count(batch):
    queries, items, labels, weight = batch
    logits = tf.matmul(queries, items, transpose_b=True).numpy()
    logits[np.arange(QUERIES), labels] = np.inf
    allowed = logits >= np.sort(logits, axis=1)[:, -4:-3]
    softmax = Softmax(temperature=0.5, num_hard_negatives=3)
    assert_same(
        lambda q, c: softmax(q, c, labels, weight),
        lambda q, c: plain(q, c, labels, weight, allowed=tf.constant(allowed)),
        queries,
        items,
    )
    many = Softmax(temperature=0.5, num_hard_negatives=100)
    everything = plain(queries, items, labels, weight).numpy()
    assert many(queries, items, labels, weight).numpy() == pytest.approx(everything, rel=1e-5)


def test_half_precision_is_close(batch):
    queries, items, labels, weight = batch
    softmax = Softmax(temperature=0.5, half_precision=True)
    assert_same(
        lambda q, c: softmax(q, c, labels, weight),
        lambda q, c: plain(q, c, labels, weight),
        queries,
        items,
        atol=5e-3,
    )


def test_the_correction_makes_samples_an_unbiased_view_of_the_corpus():
    """Sampling sets of items again and again, the mean gradient is that of the full softmax."""
    rng = np.random.default_rng(1)
    items, queries = unit(rng, 20), unit(rng, 1)
    share = rng.dirichlet(np.ones(20)).astype(np.float32)
    softmax = Softmax(temperature=0.5)
    full = softmax(queries, items, tf.constant([3])).numpy()
    losses = []
    for _ in range(400):
        drawn = np.unique(rng.choice(20, 40, p=share / share.sum()))
        rows = np.concatenate([[3], drawn[drawn != 3]])
        log_probability = np.log1p(-((1 - share[rows]) ** 40))
        losses.append(
            softmax(
                queries,
                tf.gather(items, rows),
                tf.constant([0]),
                sampling=Sampling(tf.constant(log_probability, tf.float32)),
            ).numpy()
        )
    assert np.exp(losses).mean() == pytest.approx(np.exp(full), rel=0.03)


def test_smoothed_labels_give_every_open_candidate_an_even_share(batch):
    queries, items, labels, weight = batch
    excluded = (labels + 1) % 9
    reached = 1 - tf.one_hot(excluded, 9)

    def reference(q, c):
        logits = tf.where(reached > 0, tf.matmul(q, c, transpose_b=True) / 0.5, -1e9)
        target = 0.9 * tf.one_hot(labels, 9) + 0.1 * reached / 8
        return tf.reduce_mean(weight * tf.nn.softmax_cross_entropy_with_logits(target, logits))

    softmax = Softmax(temperature=0.5, label_smoothing=0.1)
    assert_same(
        lambda q, c: softmax(q, c, labels, weight, seen=Seen(excluded[:, tf.newaxis])),
        reference,
        queries,
        items,
    )


def test_a_gpu_gets_larger_tiles_of_few_candidates(monkeypatch):
    sizes = [tf.constant(12_101), tf.constant(1_000_000)]
    assert [int(_tile(size)) for size in sizes] == [256, 256]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [f"{kind}:0"])
    assert [int(_tile(size)) for size in sizes] == [5545, 256]
