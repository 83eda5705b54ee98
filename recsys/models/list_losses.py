"""Losses of the second stage: of each candidate, of each pair of a request, of a whole request.

Labels are 1 for what is asked for, 0 for what is not. Requests of one batch differ in length: where
there is no candidate the losses of requests take -1 as the label, and a logit far below all others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import tensorflow as tf

#: Label of what is no candidate.
ABSENT = -1.0


class ListSoftmax(tf.keras.losses.Loss):
    """Cross entropy of the softmax over the candidates of a request (Cao et al., ICML 2007).

    A request without its label among the candidates has no loss.
    """

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """Loss by request, `[batch]`, of labels and logits `[batch, candidates]`."""
        return -tf.reduce_sum(tf.maximum(y_true, 0.0) * tf.nn.log_softmax(y_pred), axis=-1)


class PairLogistic(tf.keras.losses.Loss):
    """Log loss of the difference of each pair of a request, one asked for and one that is not.

    RankNet (Burges et al., ICML 2005) over lists; of a single label it is the loss of BPR (Rendle
    et al., UAI 2009) with all candidates as negatives.

    It is the mean over the pairs of a request, so that a long list counts as much as a short one; a
    request without a pair has no loss.
    """

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """Loss by request, `[batch]`, of labels and logits `[batch, candidates]`."""
        wanted, other = (tf.cast(y_true == label, y_pred.dtype) for label in (1.0, 0.0))
        pairs = wanted[:, :, tf.newaxis] * other[:, tf.newaxis]
        difference = y_pred[:, :, tf.newaxis] - y_pred[:, tf.newaxis]
        losses = tf.reduce_sum(pairs * tf.nn.softplus(-difference), axis=[1, 2])
        return tf.math.divide_no_nan(losses, tf.reduce_sum(pairs, axis=[1, 2]))


#: By `ranking.loss`.
LOSSES: dict[str, Callable[[], tf.keras.losses.Loss]] = {
    "pointwise": partial(tf.keras.losses.BinaryCrossentropy, from_logits=True),
    "pairwise": PairLogistic,
    "listwise": ListSoftmax,
}
