"""What the second stage reads: of a request, and of every item of the corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.dataset import Corpus
from recsys.features import FeatureEncoder
from recsys.schema import Feature, Schema, as_shown


@dataclass(frozen=True, slots=True)
class KnownItems:
    """What the ranker reads of every item of the corpus.

    Attributes:
        corpus: its rows are the candidates.
        vectors: `[num_items, dim]` of the candidate tower.
        statistics: `[num_items, any]`, standardised.
    """

    corpus: Corpus
    vectors: NDArray[np.float32]
    statistics: NDArray[np.float32]


class RankerFeatures(tf.Module):
    """Raw requests to what the ranker computes with, and what it knows of every item.

    Args:
        schema: of the run.
        encoder: of raw features.
        items: of the corpus.
    """

    def __init__(self, schema: Schema, encoder: FeatureEncoder, items: KnownItems) -> None:
        super().__init__()
        self.schema = schema
        self.query = _plain(schema.query)
        self.candidate = _plain(schema.candidate)
        self.item_history = next(iter(schema.item_histories), None)
        histories = tuple(schema.histories()) if self.item_history else ()
        self.other_histories = tuple(f for f in histories if f not in schema.item_histories)
        self._encoder = encoder
        self._rows = items.corpus.rows()
        # At about 1 each, as the other features are.
        norm = np.linalg.norm(items.vectors, axis=1, keepdims=True)
        scaled = items.vectors / np.maximum(norm, 1e-12) * np.sqrt(items.vectors.shape[1])
        self._vectors = _fixed(scaled.astype(np.float32), "vectors")
        self._statistics = _fixed(items.statistics, "statistics")
        raw = {f.name: tf.constant(items.corpus.features[f.name]) for f in self.candidate}
        self._of_items = {n: _fixed(v, f"item_{n}") for n, v in encoder(raw).items()}
        self._score_mean = _fixed(np.float32(0), "score_mean")
        self._score_std = _fixed(np.float32(1), "score_std")

    @property
    def vocabulary_sizes(self) -> dict[str, int]:
        """Rows that an embedding table needs, by feature that owns a vocabulary."""
        return self._encoder.vocabulary_sizes()

    def __call__(self, raw: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Encode a request: features that it reads, and `as_shown`; other keys pass through."""
        encoded: dict[str, tf.Tensor] = self._encoder(
            {k: v for k, v in raw.items() if self.item_history is None or k not in self._listed}
        )
        listed = {name: self._rows.lookup(raw[name]) for name in self._listed if name in raw}
        for feature in self.candidate:
            field = as_shown(feature.name)
            if field in raw:
                encoded |= {field: self._encoder({feature.name: raw[field]})[feature.name]}
        return encoded | listed

    @property
    def _listed(self) -> list[str]:
        return [] if self.item_history is None else [self.item_history.name]

    def renew(self, statistics: NDArray[np.float32]) -> None:
        """Read other statistics of the items from now on."""
        self._statistics.assign(statistics)

    def standardise_scores(self, mean: float, std: float) -> None:
        """Tell mean and standard deviation of the retrieval scores."""
        self._score_mean.assign(mean)
        self._score_std.assign(max(std, 1e-6))

    def standard_scores(self, scores: tf.Tensor) -> tf.Tensor:
        """Score of retrieval, distance to the best and log of the rank, `[batch, candidates, 3]`.

        Args:
            scores: `[batch, candidates]`, -inf where there is no candidate.
        """
        standard = (scores - self._score_mean) / self._score_std
        standard = tf.where(tf.math.is_finite(standard), standard, -10.0)
        best = tf.reduce_max(standard, axis=1, keepdims=True)
        order = tf.argsort(tf.argsort(standard, direction="DESCENDING", stable=True), stable=True)
        rank = tf.math.log1p(tf.cast(order, tf.float32))
        return tf.stack([standard, best - standard, rank - 3.0], axis=-1)

    def known(self, encoded: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Which places of the histories hold an event, bool `[batch, length]`."""
        present = [encoded[self._listed[0]] >= 0]
        present += [encoded[f.name] > 0 for f in self.other_histories]
        return tf.reduce_any(tf.stack(present), axis=0)

    def vectors(self, rows: tf.Tensor) -> tf.Tensor:
        """Vectors of items, `[..., dim]`; zeros for row -1."""
        found = tf.gather(self._vectors, tf.maximum(rows, 0))
        return tf.where((rows >= 0)[..., tf.newaxis], found, 0.0)

    def statistics(self, rows: tf.Tensor) -> tf.Tensor:
        """Statistics of candidates, `[batch, candidates, any]`."""
        return tf.gather(self._statistics, tf.maximum(rows, 0))

    def of_candidates(self, rows: tf.Tensor) -> dict[str, tf.Tensor]:
        """Encoded features of items by name, `[rows, ...]`."""
        return {n: tf.gather(v, tf.maximum(rows, 0)) for n, v in self._of_items.items()}


def _plain(features: Sequence[Feature]) -> tuple[Feature, ...]:
    """Features that are neither ids nor histories."""
    return tuple(f for f in features if f.kind not in ("id", "history"))


def _fixed(values: Any, name: str) -> tf.Variable:
    return tf.Variable(values, trainable=False, name=name)
