"""The last places of a list filled by chance inside the served graph, and the check in NumPy.

Each such slot is filled by a draw among the candidates that are not above it, whose probability is
known in closed form, given the query and what stands above: the propensity, which off-policy
estimators divide by (`recsys.off_policy`). The chances of a slot:

- `epsilon_greedy`: the next best has `1 - epsilon + epsilon / m`, each other of `m` candidates
  `epsilon / m`.
- `thompson`: each score is drawn from a Gumbel distribution of one scale around it, and the best is
  taken: `softmax(scores / scale)`, by the Gumbel-max trick, as over the slots of a list (Kool et
  al., "Stochastic Beams and Where to Find Them", ICML 2019). It is Thompson sampling with a
  posterior of that shape, equally wide for all items: other posteriors have no propensity in
  closed form, and one that knows of some items more than of others is not learned here.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.list_config import EpsilonGreedy, Thompson

Floats = NDArray[np.float32]
Settings = EpsilonGreedy | Thompson

_TOLERANCE = 1e-5
_CHANCE_TOLERANCE = 1e-3


class Exploration(tf.Module):
    """Fills the slots of each list, and tells the propensity of all of its places.

    Args:
        settings: kind, slots, pool.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.pool = settings.pool
        self._settings = settings

    def explored(
        self, rows: tf.Tensor, scores: tf.Tensor, ends: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Draw what stands in the last `slots` of the first `ends` places.

        Args:
            rows: corpus rows `[batch, n]`, in the order in which they are shown otherwise.
            scores: `[batch, n]`, -inf at the end for none.
            ends: int32 `[batch]`, length of each list, at most n.

        Returns:
            Rows, scores and propensities, `[batch, n]`. What is behind `ends` is of no use. A
            place that nothing is drawn for has propensity 1, one without an item 0.
        """
        places = tf.range(tf.shape(rows)[1])[tf.newaxis]
        first = tf.maximum(ends - self._settings.slots, 0)[:, tf.newaxis]
        found = tf.math.is_finite(scores)
        free = found & (places >= first) & (places < self.pool)
        order, propensity = tf.zeros_like(rows) + places, tf.cast(found, tf.float32)
        for slot in range(self._settings.slots):
            chances = self._chances(scores, free)
            chosen = self._draw(chances, slot)
            here = (places == first + slot) & tf.reduce_any(free, axis=1, keepdims=True)
            order = tf.where(here, chosen, order)
            chance = tf.gather(chances, chosen, batch_dims=1)
            propensity = tf.where(here, chance, propensity)
            free &= places != chosen
        rows, scores = (tf.gather(values, order, batch_dims=1) for values in (rows, scores))
        return rows, scores, propensity

    def _chances(self, scores: tf.Tensor, free: tf.Tensor) -> tf.Tensor:
        """Probability of each candidate to be drawn, `[batch, n]`; 0 for what is not free."""
        settings = self._settings
        if isinstance(settings, Thompson):
            # Rows without any candidate must not become NaN.
            logits = tf.where(free, scores / settings.scale, -np.inf)
            some = tf.reduce_any(free, axis=1, keepdims=True)
            return tf.where(free, tf.nn.softmax(tf.where(some, logits, 0.0)), 0.0)
        share = tf.cast(free, tf.float32)
        uniform = tf.math.divide_no_nan(share, tf.reduce_sum(share, axis=1, keepdims=True))
        next_best = tf.one_hot(tf.argmax(share, axis=1), tf.shape(scores)[1])
        return settings.epsilon * uniform + (1 - settings.epsilon) * next_best * share

    def _draw(self, chances: tf.Tensor, slot: int) -> tf.Tensor:
        """Position of one candidate, int32 `[batch, 1]`."""
        # The raw op: others take the seed of the process that exports, for all servers alike.
        seed = self._settings.seed
        seeds = (0, 0) if seed is None else (seed, slot + 1)
        drawn = tf.raw_ops.Multinomial(
            logits=tf.math.log(chances),
            num_samples=1,
            seed=seeds[0],
            seed2=seeds[1],
            output_dtype=tf.int32,
        )
        # Where there is no chance at all, the op answers with a position that there is not.
        return tf.minimum(drawn, tf.shape(chances)[1] - 1)


def explains(
    settings: Settings,
    scores: Floats,
    rows: NDArray[np.int_],
    propensities: Floats,
    arranged: bool,
) -> NDArray[np.bool_]:
    """Tell which places of the slots hold an item that may be drawn, with its own propensity.

    Args:
        settings: that the model should have.
        scores: of all candidates, `[n, N]`, -inf for what may not be returned.
        rows: corpus rows of the answer, `[n, k]` with k below the pool, -1 for none.
        propensities: of the answer, `[n, k]`.
        arranged: whether the next best is not that of scores alone.

    Returns:
        `[n, slots]`, or fewer columns where k is smaller.
    """
    first = max(rows.shape[1] - settings.slots, 0)
    pool = np.argsort(-scores, axis=1, kind="stable")[:, : settings.pool]
    best = np.take_along_axis(scores, pool, axis=1)
    above = (pool[:, :, np.newaxis] == rows[:, np.newaxis, :first]).any(axis=2)
    free = np.isfinite(best) & ~above
    right = np.zeros((len(rows), rows.shape[1] - first), bool)
    for slot in range(right.shape[1]):
        row, found = rows[:, first + slot, np.newaxis], propensities[:, first + slot]
        own = (pool == row) & free
        drawn = own.any(axis=1) & _is_chance(settings, best, free, own, found, arranged)
        right[:, slot] = np.where(free.any(axis=1), drawn, (row[:, 0] < 0) & (found == 0))
        free &= ~own
    return right


def _is_chance(
    settings: Settings,
    best: Floats,
    free: NDArray[np.bool_],
    own: NDArray[np.bool_],
    found: Floats,
    arranged: bool,
) -> NDArray[np.bool_]:
    """Whether `found` `[n]` is the chance of the candidate `own`, `[n, pool]`."""
    most = np.where(free, best, -np.inf).max(axis=1)
    value = np.where(own, best, -np.inf).max(axis=1)
    tolerance = _TOLERANCE * np.maximum(1, np.abs(np.where(np.isfinite(most), most, 0)))
    if isinstance(settings, Thompson):
        with np.errstate(invalid="ignore"):
            weights = np.where(free, np.exp((best - most[:, np.newaxis]) / settings.scale), 0)
        chance = np.where(own, weights, 0).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-38)
        relative = _CHANCE_TOLERANCE + 4 * tolerance / settings.scale
        close: NDArray[np.bool_] = np.abs(found - chance) <= relative * chance + 1e-7
        return close
    other = settings.epsilon / np.maximum(free.sum(axis=1), 1)
    is_next = np.isclose(found, 1 - settings.epsilon + other, rtol=_CHANCE_TOLERANCE)
    # Candidates that tie for the next best cannot be told apart.
    rivals = (free & ~own & (best >= (value - tolerance)[:, np.newaxis])).any(axis=1)
    may_be_next = arranged | (value >= most - tolerance)
    may_be_other = arranged | rivals
    is_other = np.isclose(found, other, rtol=_CHANCE_TOLERANCE)
    return (is_next & may_be_next) | (is_other & may_be_other)
