"""The end of the list inside the served graph: what becomes of the best before they are shown."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from recsys import list_config
from serving_export.diversity import Diversity
from serving_export.exploration import Exploration, Settings


class Options(NamedTuple):
    """What is asked of the end of the list; None for what is not."""

    diversity: list_config.Diversity | None = None
    exploration: Settings | None = None

    @property
    def pool(self) -> int:
        """Number of candidates that decide which few are shown; 0 where scores alone do."""
        return max((option.pool for option in self if option is not None), default=0)


class ListEnd(tf.Module):
    """Orders the best of each query by diversity, then lets some of the last places explore.

    Args:
        options: at least one.
        embeddings: of the candidates, a variable `[N, dim]`.
    """

    def __init__(self, options: Options, embeddings: tf.Variable) -> None:
        super().__init__()
        diversity, exploration = options
        self._pool = options.pool
        self._diversity = None if diversity is None else Diversity(diversity, embeddings)
        self._exploration = None if exploration is None else Exploration(exploration)

    def needed(self, k: tf.Tensor, most: int) -> tf.Tensor:
        """Candidates of which `k` are shown, shaped as k; at most `most`, as many as there are."""
        return tf.minimum(tf.maximum(self._pool, k), most)

    def shown(
        self, rows: tf.Tensor, scores: tf.Tensor, k: tf.Tensor, asked: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        """What is shown, `[batch, k]`.

        Args:
            rows: corpus rows `[batch, n]`.
            scores: `[batch, n]`, best first, -inf at the end for none.
            k: int32 `[]`, length of the longest list, at most n.
            asked: int32 `[]` or `[batch]`, places that each query wants.

        Returns:
            Rows, scores and, where places explore, propensities.
        """
        if self._diversity is not None:
            rows, scores = self._diversity.arranged(rows, scores, k)
        parts: tuple[tf.Tensor, ...] = (rows, scores)
        if self._exploration is not None:
            ends = tf.broadcast_to(tf.clip_by_value(asked, 0, k), tf.shape(rows)[:1])
            parts = self._exploration.explored(rows, scores, ends)
        return tuple(part[:, :k] for part in parts)
