"""The served model of a joint training: retrieval recommends, and the ranking head can be asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from recsys.features import raw_signature
from serving_export.retriever import Retriever, Tensors


class JointRetriever(Retriever):
    """A `Retriever` whose towers have a ranking head: the signature `rank` asks it.

    `rank` takes the query and context features, and `candidates` string `[batch, any]`, and gives
    `scores` float32 in their places: the head's log odds, -inf for "" and ids that are not known.
    It is for lists that have come about elsewhere, as the other sources of a page, where no second
    stage was trained. `recommend` does not ask it: the head knows how an event turns out that comes
    about, and not whether it does.
    """

    def signatures(self) -> dict[str, Any]:
        """Trace every signature; what `tf.saved_model.save` takes."""
        inputs = raw_signature(self._schema.query) | {
            "candidates": tf.TensorSpec([None, None], tf.string, "candidates")
        }
        rank = tf.function(self.rank).get_concrete_function(**inputs)
        return super().signatures() | {"rank": rank}

    def rank(self, /, **request: tf.Tensor) -> Tensors:
        """Score the candidates given, `[batch, any]`."""
        query = self.embed_query(**self._features(request))["embedding"]
        rows = self._rows.lookup(request["candidates"])
        vectors = tf.gather(self._embeddings, tf.maximum(rows, 0))
        head = self._towers.signatures["log_odds"]
        scores = head(queries=query, candidates=vectors)["log_odds"]
        return {"scores": tf.where(rows >= 0, scores, -np.inf)}
