"""The served model of two stages: retrieval finds candidates, the ranker orders them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import PreparedData, TrainedRanker
from recsys.dataset import Corpus
from recsys.features import raw_signature
from recsys.models.embed import load_savedmodel
from serving_export.retriever import PLAIN, Policy, Retriever, SearchIndex, Tensors


class Second(NamedTuple):
    """The second stage: a SavedModel with the signature `rank`, and how many it ranks."""

    ranker: Any
    candidates: int


class Stages(NamedTuple):
    """SavedModel of the towers, and what ranks what they find."""

    towers: Any
    second: Second


def load_second(ranker: TrainedRanker) -> Second:
    """Load what `rank` has trained.

    Raises:
        ArtifactError: it cannot be loaded.
    """
    module = load_savedmodel(ranker.directory / ranker.ranker, "rank")
    return Second(module, ranker.candidates)


class TwoStageRecommender(Retriever):
    """Embed, search, exclude, rank, cut: all within `recommend`.

    Signatures beside `embed_query` and `embed_candidate` (`N` items, `C` candidates):

    - `recommend`, also `serving_default`: inputs as those of `Retriever`. The best C that may be
      returned are ranked; gives `ids` and `scores`, `[batch, min(largest k, C, N)]`: no answer is
      longer than what was ranked. Scores are calibrated log odds. A query that is answered by
      popularity is not ranked, and its scores are those of popularity. Diversity and
      exploration take the best by those scores.
    - `retrieve`: the first stage alone, as `recommend` of `Retriever` without what is
      done at the end of the list.
    - `rank`: the query and context features, and `candidates` string `[batch, any]`. Gives `scores`
      float32 in their places; -inf for "" and ids that are not known. With several tasks also
      `probabilities`, `[batch, any, tasks]`, in the order of the contract; 0 for "" and such ids.

    Args:
        stages: towers and ranker.
        index: over the corpus.
        corpus: candidates.
        data: that the towers were trained on.
        embeddings: of the candidates, `[N, dim]`.
        policy: what decides beside scores; what may not be returned is not ranked.
    """

    def __init__(
        self,
        stages: Stages,
        index: SearchIndex,
        corpus: Corpus,
        data: PreparedData,
        embeddings: NDArray[np.float32],
        policy: Policy = PLAIN,
    ) -> None:
        super().__init__(stages.towers, index, corpus, data, embeddings, policy)
        self._ranker = stages.second.ranker
        self._depth = min(stages.second.candidates, len(corpus))

    def signatures(self) -> dict[str, Any]:
        """Trace every signature; what `tf.saved_model.save` takes."""
        found = super().signatures()
        inputs = raw_signature(self._schema.query) | {
            "candidates": tf.TensorSpec([None, None], tf.string, "candidates")
        }
        retrieve = tf.function(self.retrieve).get_concrete_function(**self._request())
        rank = tf.function(self.rank).get_concrete_function(**inputs)
        return found | {"retrieve": retrieve, "rank": rank}

    def recommend(self, /, **request: tf.Tensor) -> Tensors:
        """Answer `ids`, `scores` and maybe `propensities`, `[batch, min(largest k, C, N)]`."""
        features = self._features(request)
        rows, scores = self._best(request, tf.constant(self._depth))
        found = tf.math.is_finite(scores)
        ranked = self._ranked(features, tf.where(found, rows, -1), scores)["scores"]
        k = tf.clip_by_value(tf.reduce_max(request["k"]), 0, self._depth)
        shown = k if self._end is None else self._end.needed(k, self._depth)
        best, order = tf.math.top_k(ranked, shown)
        parts = tf.gather(rows, order, batch_dims=1), best
        if self._end is not None:
            parts = self._end.shown(*parts, k, request["k"])
        return self._answer(request["k"], *parts)

    def rank(self, /, **request: tf.Tensor) -> Tensors:
        """Score the candidates given, `[batch, any]`."""
        features = self._features(request)
        rows = self._rows.lookup(request["candidates"])
        ranked = self._ranked(features, rows, self._retrieval_scores(features, rows))
        if "log_odds" not in ranked:
            return ranked
        known = tf.cast(rows >= 0, tf.float32)[..., tf.newaxis]
        probabilities = known * tf.sigmoid(ranked["log_odds"])
        return {"scores": ranked["scores"], "probabilities": probabilities}

    def _ranked(
        self, features: Mapping[str, tf.Tensor], rows: tf.Tensor, scores: tf.Tensor
    ) -> Tensors:
        """What the ranker gives; its scores are those of retrieval where a query is cold."""
        request = dict(features) | self._recent(features)
        request |= {"candidates": rows, "retrieval_scores": scores}
        ranked: Tensors = self._ranker.signatures["rank"](**request)
        cold = self._cold(features)[:, tf.newaxis]
        return ranked | {"scores": tf.where(cold, scores, ranked["scores"])}

    def _retrieval_scores(self, features: Mapping[str, tf.Tensor], rows: tf.Tensor) -> tf.Tensor:
        """What retrieval gives these rows, whether it would find them or not; -inf for row -1."""
        query = self.embed_query(**features)
        vectors = tf.gather(self._embeddings, tf.maximum(rows, 0))
        scores = tf.linalg.matvec(vectors, query["embedding"])
        if "repeat" in query:
            seen = self._seen_rows(features, tf.zeros([1, 1], tf.bool))
            same = tf.cast(rows[:, :, tf.newaxis] == seen[:, tf.newaxis], tf.float32)
            scores += tf.linalg.matvec(same, query["repeat"])
        prior = tf.gather(self._prior_by_row, tf.maximum(rows, 0))
        scores = tf.where(self._cold(features)[:, tf.newaxis], prior, scores)
        return tf.where(rows >= 0, scores, -np.inf)
