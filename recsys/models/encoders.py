"""History encoders: a vector for every position of a sequence, of the events up to it alone.

Each maps `[batch, length, dim]` to `[batch, length, dim]`. They are causal, so that one pass over a
sequence trains on all of its positions, and padding at the end reaches no position before it.

Each adds what it learns to weighted means of what was seen, which find more of the same before
anything is learned.
"""

from __future__ import annotations

import math

import tensorflow as tf

from recsys.model_config import HistoryEncoder
from recsys.models.dropout import Dropouts

_NUM_POOLS = 2
_FEED_FORWARD = 4


def history_encoder(
    config: HistoryEncoder, dim: int, length: int, dropouts: Dropouts
) -> tf.keras.layers.Layer:
    """Make the encoder that the config names.

    Args:
        config: `kind` and its settings.
        dim: size of events and of the result.
        length: of the longest history.
        dropouts: maker of the dropout layers.
    """
    match config.kind:
        case "mean":
            return MeanEncoder(config.salience, dim, length, dropouts)
        case "attention":
            return AttentionEncoder(config, dim, length, dropouts)
        case "gru" | "lstm":
            return RecurrentEncoder(config, dim, length, dropouts)


class MeanEncoder(tf.keras.layers.Layer):
    """Several weighted means of what was seen; each learns what makes an event count.

    The weight of an event depends on how many events came after it, so that one pool can look at
    the last click alone and another at the whole session. With `salience` it depends on the event
    itself too, so that what lies in the cart can outweigh what was looked at; sparse data overfit
    it.
    """

    def __init__(self, salience: bool, dim: int, length: int, dropouts: Dropouts) -> None:
        super().__init__()
        self._length = length
        self._dropout = dropouts()
        dense = tf.keras.layers.Dense(_NUM_POOLS, use_bias=False, kernel_initializer="zeros")
        self._salience = dense if salience else None
        self._project = tf.keras.layers.Dense(dim, kernel_initializer="zeros")

    def build(self, input_shape: tf.TensorShape) -> None:
        """Create the weights by recency, `[num_pools, length]`, and the gain of each pool."""
        recency = tf.range(self._length, dtype=tf.float32)
        # One pool starts close to the last click, one close to the plain mean.
        decay = tf.reshape(tf.linspace(1.0, 0.0, _NUM_POOLS), [-1, 1])
        self._logits = self.add_weight("recency", [_NUM_POOLS, self._length], initializer="zeros")
        self._logits.assign(-decay * recency)
        average = tf.keras.initializers.Constant(1 / _NUM_POOLS)
        self._gain = self.add_weight("gain", [_NUM_POOLS], initializer=average)

    def call(self, events: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Encode `[batch, length, dim]`."""
        length = tf.shape(events)[1]
        logits = tf.gather(self._logits, _distances(length), axis=1)
        logits += _future(length, logits.dtype)
        if self._salience is not None:
            salience = tf.transpose(self._salience(events), [0, 2, 1])
            logits += salience[:, :, tf.newaxis]
        # Without salience all sequences share the weights: `...` is then nothing.
        pools = tf.einsum("...pqk,...kd->...qpd", tf.nn.softmax(logits), events)
        kept = tf.einsum("p,bqpd->bqd", self._gain, pools)
        flat = tf.reshape(pools, [-1, length, _NUM_POOLS * events.shape[-1]])
        return kept + self._project(self._dropout(flat, training=training))


class RecurrentEncoder(tf.keras.layers.Layer):
    """GRU (Hidasi et al., ICLR 2016) or LSTM, added to the pools of `MeanEncoder`."""

    def __init__(self, config: HistoryEncoder, dim: int, length: int, dropouts: Dropouts) -> None:
        super().__init__()
        self._mean = MeanEncoder(config.salience, dim, length, dropouts)
        cells = {"gru": tf.keras.layers.GRU, "lstm": tf.keras.layers.LSTM}
        self._cell = cells[config.kind](dim, return_sequences=True)
        self._project = tf.keras.layers.Dense(dim, kernel_initializer="zeros")
        self._dropouts = [dropouts(), dropouts()]

    def call(self, events: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Encode `[batch, length, dim]`."""
        states = self._cell(self._dropouts[0](events, training=training))
        learned = self._project(self._dropouts[1](states, training=training))
        return self._mean(events, training=training) + learned


class AttentionEncoder(tf.keras.layers.Layer):
    """Causal transformer in the manner of SASRec (Kang and McAuley, ICDM 2018).

    Normalisation comes first (Xiong et al., ICML 2020). Order is told by a learned bias for each
    distance and head (as in T5, Raffel et al., JMLR 2020) instead of absolute positions. The pools
    of `MeanEncoder` are added to what attention finds: it learns in half as many epochs.
    """

    def __init__(self, config: HistoryEncoder, dim: int, length: int, dropouts: Dropouts) -> None:
        super().__init__()
        self._mean = MeanEncoder(config.salience, dim, length, dropouts)
        self._dropout = dropouts()
        self._blocks = [
            _Block(config.num_heads, dim, length, dropouts) for _ in range(config.num_blocks)
        ]
        self._norm = tf.keras.layers.LayerNormalization(epsilon=1e-6)

    def call(self, events: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Encode `[batch, length, dim]`."""
        states = self._dropout(events, training=training)
        for block in self._blocks:
            states = block(states, training=training)
        return self._norm(states) + self._mean(events, training=training)


class _Block(tf.keras.layers.Layer):
    def __init__(self, num_heads: int, dim: int, length: int, dropouts: Dropouts) -> None:
        super().__init__()
        self._num_heads = num_heads
        self._length = length
        dense = tf.keras.layers.Dense
        self._projections = [dense(dim, use_bias=False) for _ in ("query", "key", "value")]
        self._output = dense(dim, use_bias=False)
        self._feed_forward = [dense(_FEED_FORWARD * dim, "gelu"), dense(dim)]
        self._norms = [tf.keras.layers.LayerNormalization(epsilon=1e-6) for _ in range(2)]
        self._dropouts = [dropouts() for _ in range(3)]

    def build(self, input_shape: tf.TensorShape) -> None:
        """Create the bias by distance, `[num_heads, length]`."""
        shape = [self._num_heads, self._length]
        self._bias = self.add_weight("distance", shape, initializer="zeros")

    def call(self, states: tf.Tensor, training: bool = False) -> tf.Tensor:
        attended = self._attend(self._norms[0](states))
        states += self._dropouts[0](attended, training=training)
        hidden = self._feed_forward[0](self._norms[1](states))
        hidden = self._feed_forward[1](self._dropouts[1](hidden, training=training))
        return states + self._dropouts[2](hidden, training=training)

    def _attend(self, states: tf.Tensor) -> tf.Tensor:
        length, dim = tf.shape(states)[1], states.shape[-1]
        query, key, value = (self._heads(project(states)) for project in self._projections)
        scores = tf.matmul(query, key, transpose_b=True) / math.sqrt(dim / self._num_heads)
        scores += tf.gather(self._bias, _distances(length), axis=1)
        scores += _future(length, scores.dtype)
        heads = tf.transpose(tf.matmul(tf.nn.softmax(scores), value), [0, 2, 1, 3])
        return self._output(tf.reshape(heads, [-1, length, dim]))

    def _heads(self, states: tf.Tensor) -> tf.Tensor:
        shape = [-1, tf.shape(states)[1], self._num_heads, states.shape[-1] // self._num_heads]
        return tf.transpose(tf.reshape(states, shape), [0, 2, 1, 3])


def _distances(length: tf.Tensor) -> tf.Tensor:
    """How many events lie between a position and an earlier one, `[length, length]`."""
    place = tf.range(length)
    return tf.maximum(place[:, tf.newaxis] - place, 0)


def _future(length: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Minus infinity, almost, where a position must not look, `[length, length]`."""
    place = tf.range(length)
    return tf.cast(tf.where(place[:, tf.newaxis] < place, -1e9, 0.0), dtype)
