"""The served model: towers, index and tables behind named signatures.

Every input of a signature must be given (TensorFlow Serving knows no default values): `k` and
`exclusions` (`[batch, 0]` when there are none) included.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import PreparedData
from recsys.dataset import Corpus
from recsys.features import raw_signature
from recsys.schema import Schema
from serving_export.completion import Completion, Query
from serving_export.filters import contains
from serving_export.list_end import ListEnd, Options
from serving_export.restrictions import Restrictions

Tensors = dict[str, tf.Tensor]


class SearchIndex(Protocol):
    """Finds candidates by dot product."""

    def search(self, queries: tf.Tensor, counts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Find corpus rows and scores, best first, `[batch, <= largest count]`; NaN for none.

        Counts are int32 `[batch]`, at least 1; what a query finds must not depend on the others.
        """
        ...


def log_prior(corpus: Corpus) -> NDArray[np.float32]:
    """Log probability of each item to be a label, `[num_items]`; add-one, so that all are finite.

    It is what a query without any known user or item is answered with.
    """
    counts = corpus.labels + 1.0
    return np.log(counts / counts.sum()).astype(np.float32)


class Policy(NamedTuple):
    """What decides an answer beside scores and exclusions.

    Attributes:
        prior_when_cold: whether cold queries are answered by popularity.
        restrictions: what may be returned; None where that is up to exclusions alone.
        end: what is done with the best before they are shown.
    """

    prior_when_cold: bool = True
    restrictions: Restrictions | None = None
    end: Options = Options()


PLAIN = Policy()


class Retriever(tf.Module):
    """String features in, item ids and scores out.

    Signatures (`N` candidates):

    - `recommend`, also `serving_default`: the query and context features by name, string, float32
      or int64 `[batch]`, a history string `[batch, any]` oldest first padded with "", a vector
      float32 `[batch, dim]`, zeros when missing; `k` int32 `[]`, or `[batch]`, which is how a
      server passes on requests that are written row by row; `exclusions` string `[batch, any]`,
      ids not to return, padded with ""; and what filters take (`serving_export.filters`). Gives
      `ids` string and `scores` float32, `[batch, min(largest k, N)]`, best first; where a query
      wants fewer, or fewer candidates are left, id "" and score -inf at the end.
    - `embed_query`, `embed_candidate`: raw features to `embedding` float32 `[batch, dim]`, and of
      queries `repeat` float32 `[batch, length]` if the towers give it.

    Histories list the same events, so all of them must be given in one width.

    Unknown ids and empty histories are no errors. A query is cold when the schema has item
    histories or user ids and none of them holds a value of its training vocabulary; it is answered
    by popularity, unless the towers have learned from such queries (`prior_when_cold`). With
    `exclude_seen`, items of the histories given are not returned either. Towers whose `embed_query`
    gives `repeat` `[batch, length]` add it to the scores of the history's items, which are
    candidates even where the index does not find them.

    Filters, and what is not available, are applied to what the index finds, which is asked for more
    then; a query that is left with fewer than k is answered by exact search over the corpus.

    With diversity the best of a pool are returned in the order of `serving_export.diversity`, then
    what is behind the pool; scores are what they were, so they no longer fall along the list. With
    exploration the last places of each list are filled by `serving_export.exploration`, and
    `recommend` also gives `propensities` float32 `[batch, min(largest k, N)]`: the probability of
    the item in its place, given the query and what stands above; 1 where nothing was drawn, 0 where
    there is no item.

    Args:
        towers: SavedModel of the towers.
        index: over the corpus.
        corpus: candidates.
        data: that the towers were trained on.
        embeddings: of the candidates, `[N, dim]`; needed by towers that give `repeat`, by
            restrictions and by what is done at the end of the list.
        policy: what decides beside scores.
    """

    def __init__(
        self,
        towers: Any,
        index: SearchIndex,
        corpus: Corpus,
        data: PreparedData,
        embeddings: NDArray[np.float32] | None = None,
        policy: Policy = PLAIN,
    ) -> None:
        super().__init__()
        self._embeddings = (
            None
            if embeddings is None
            else tf.Variable(embeddings, trainable=False, name="embeddings")
        )
        self._prior_when_cold, self._restrictions, options = policy
        self._end = ListEnd(options, self._embeddings) if any(options) else None
        self._schema: Schema = data.features
        self._exclude_seen = data.exclude_seen
        self._size = len(corpus)
        self._towers = towers
        self._index = index
        self._ids = tf.Variable(tf.constant(corpus.item, tf.string), trainable=False, name="ids")
        self._rows = corpus.rows()
        self._known = _vocabulary_tables(data)
        prior = log_prior(corpus)
        order = np.argsort(-prior, kind="stable").astype(np.int32)
        self._popular = tf.Variable(order, trainable=False, name="popular")
        self._prior = tf.Variable(prior[order], trainable=False, name="log_prior")
        self._prior_by_row = tf.Variable(prior, trainable=False, name="log_prior_by_row")
        self._completion = (
            None
            if self._restrictions is None
            else Completion(self._restrictions, self._embeddings, self._prior_by_row)
        )

    def signatures(self) -> dict[str, Any]:
        """Trace every signature; what `tf.saved_model.save` takes."""
        query = raw_signature(self._schema.query)
        candidate = raw_signature(self._schema.candidate)
        recommend = tf.function(self.recommend).get_concrete_function(**self._request())
        return {
            "serving_default": recommend,
            "recommend": recommend,
            "embed_query": tf.function(self.embed_query).get_concrete_function(**query),
            "embed_candidate": tf.function(self.embed_candidate).get_concrete_function(**candidate),
        }

    def _request(self) -> dict[str, tf.TensorSpec]:
        return (
            raw_signature(self._schema.query)
            | {
                "k": tf.TensorSpec(None, tf.int32, "k"),
                "exclusions": tf.TensorSpec([None, None], tf.string, "exclusions"),
            }
            | (self._restrictions.inputs() if self._restrictions is not None else {})
        )

    def _features(self, request: Mapping[str, tf.Tensor]) -> Tensors:
        return {f.name: request[f.name] for f in self._schema.query}

    def embed_query(self, /, **features: tf.Tensor) -> Tensors:
        """Embed raw query and context features: the outputs of the query tower."""
        outputs: Tensors = self._towers.signatures["embed_query"](
            **features | self._recent(features)
        )
        return outputs

    def _recent(self, features: Mapping[str, tf.Tensor]) -> Tensors:
        """The latest events of the histories, as in training: a value within may be missing."""
        listed = [f.name for f in self._schema.item_histories] or [
            f.name for f in self._schema.histories()
        ]
        if not listed:
            return {}
        happened = tf.reduce_any(tf.stack([features[name] != "" for name in listed]), axis=0)
        return {
            f.name: _latest(features[f.name], happened, f.length) for f in self._schema.histories()
        }

    def embed_candidate(self, /, **features: tf.Tensor) -> Tensors:
        """Embed raw candidate features as `embedding` `[batch, dim]`."""
        return {"embedding": self._towers.signatures["embed_candidate"](**features)["embedding"]}

    def recommend(self, /, **request: tf.Tensor) -> Tensors:
        """Answer `ids`, `scores` and maybe `propensities`, `[batch, min(largest k, N)]`."""
        if self._end is None:
            return self.retrieve(**request)
        k = tf.clip_by_value(request["k"], 0, self._size)
        best = self._best(request, self._end.needed(k, self._size))
        return self._answer(request["k"], *self._end.shown(*best, _largest(k), request["k"]))

    def retrieve(self, /, **request: tf.Tensor) -> Tensors:
        """Answer `ids` and `scores`, `[batch, min(largest k, N)]`, by the scores of the towers."""
        k = tf.clip_by_value(request["k"], 0, self._size)
        return self._answer(request["k"], *self._best(request, k))

    def _best(self, request: Mapping[str, tf.Tensor], k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Find rows and scores of the best that may be returned, `[batch, largest k]`.

        Args:
            request: a batch of queries.
            k: int32 `[batch]`, wanted by each, or `[]` by all. What stands behind is not to be
                relied on: how far a query is searched for is not up to what others want.

        Returns:
            Rows and scores, -inf where there is none.
        """
        query, most = self._query(request), _largest(k)
        counts = self._counts(query, request, k)
        rows, scores = self._index.search(query.embedding, counts)
        width = tf.maximum(most, _largest(counts))
        rows, scores = _widened(rows, scores, width)
        cold = query.cold[:, tf.newaxis]
        rows = tf.where(cold, self._popular[:width], rows)
        scores = tf.where(cold, self._prior[:width], scores)
        # Nothing that was not fetched is better than this; the items of the history may be worse.
        floor = tf.reduce_min(tf.where(tf.math.is_nan(scores), np.inf, scores), axis=1)
        if query.repeat is not None:
            rows, scores = self._with_repeats(rows, scores, query)
        dropped = contains(query.excluded, rows, self._size) | tf.math.is_nan(scores)
        if self._restrictions is not None:
            dropped |= tf.logical_not(self._restrictions.allow(request, rows))
        scores, order = tf.math.top_k(tf.where(dropped, -np.inf, scores), most)
        rows = tf.gather(rows, order, batch_dims=1)
        if self._completion is None:
            return rows, scores
        # Where the whole corpus was fetched there is no more than that.
        wanted = tf.where(counts < self._size, k, 0)
        return self._completion.complete(query, request, (rows, scores), floor, wanted)

    def _counts(self, query: Query, request: Mapping[str, tf.Tensor], k: tf.Tensor) -> tf.Tensor:
        """Candidates to fetch for each query, int32 `[batch]`."""
        listed = tf.concat([query.excluded, query.seen], axis=1)
        spare = tf.reduce_sum(tf.cast(listed >= 0, tf.int32), axis=1)
        wanted = k if self._restrictions is None else self._restrictions.fetched(request, k)
        # Even if every excluded item is among the best, k others are. ScaNN refuses to find none.
        return tf.clip_by_value(wanted + spare, 1, self._size)

    def _query(self, request: Mapping[str, tf.Tensor]) -> Query:
        features = self._features(request)
        embedded, cold = self.embed_query(**features), self._cold(features)
        repeat = embedded.get("repeat")
        if repeat is None:
            seen = tf.zeros([tf.shape(cold)[0], 0], tf.int32)
        else:
            seen = self._seen_rows(features, cold[:, tf.newaxis])
        excluded = self._excluded_rows(features, request["exclusions"])
        return Query(embedded["embedding"], cold, excluded, seen, repeat)

    def _answer(
        self, k: tf.Tensor, rows: tf.Tensor, scores: tf.Tensor, *propensities: tf.Tensor
    ) -> Tensors:
        """Name the best, as many as each query wants: `k` is `[]` or `[batch]`."""
        wanted = tf.range(tf.shape(scores)[1]) < tf.reshape(k, [-1, 1])
        scores = tf.where(wanted, scores, -np.inf)
        ids = tf.gather(self._ids, rows)
        answer = {"ids": tf.where(tf.math.is_inf(scores), "", ids), "scores": scores}
        if not propensities:
            return answer
        return answer | {"propensities": tf.where(wanted, propensities[0], 0.0)}

    def _seen_rows(self, features: Mapping[str, tf.Tensor], cold: tf.Tensor) -> tf.Tensor:
        """Corpus rows of the history, `[batch, length]`; -1 for none, and all of a cold query."""
        history = self._recent(features)[self._schema.item_histories[0].name]
        return tf.where(cold, -1, self._rows.lookup(history))

    def _with_repeats(
        self, rows: tf.Tensor, scores: tf.Tensor, query: Query
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Score the items of the history exactly, once each, in place of what the index says."""
        seen = query.seen
        scores = tf.where(contains(seen, rows, self._size), -np.inf, scores)
        same = (seen[:, :, tf.newaxis] == seen[:, tf.newaxis]) & (seen >= 0)[:, tf.newaxis]
        added = tf.linalg.matvec(tf.cast(same, tf.float32), query.repeat)
        vectors = tf.gather(self._embeddings, tf.maximum(seen, 0))
        own = tf.linalg.matvec(vectors, query.embedding) + added
        earlier = tf.linalg.band_part(same, -1, 0) & ~tf.eye(tf.shape(seen)[1], dtype=tf.bool)
        once = (seen >= 0) & ~tf.reduce_any(earlier, axis=2)
        own = tf.where(once, own, -np.inf)
        return tf.concat([rows, tf.maximum(seen, 0)], 1), tf.concat([scores, own], 1)

    def _excluded_rows(self, features: Mapping[str, tf.Tensor], exclusions: tf.Tensor) -> tf.Tensor:
        """Corpus rows that may not be returned, `[batch, width]`, -1 for unknown ids."""
        lists = [exclusions]
        if self._exclude_seen:
            lists += [features[f.name] for f in self._schema.item_histories]
        return self._rows.lookup(tf.concat(lists, axis=1))

    def _cold(self, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Whether nothing identifies a query, `[batch]`."""
        known = [
            tf.reduce_any(self._is_known(feature.of or "", features[feature.name]), axis=1)
            for feature in self._schema.item_histories
        ] + [self._is_known(f.name, features[f.name]) for f in self._schema.user_ids]
        if not known or not self._prior_when_cold:
            batch = tf.shape(next(iter(features.values())))[0]
            return tf.zeros([batch], tf.bool)
        return tf.logical_not(tf.reduce_any(tf.stack(known), axis=0))

    def _is_known(self, feature: str, values: tf.Tensor) -> tf.Tensor:
        table = self._known.get(feature)
        return tf.zeros_like(values, tf.bool) if table is None else table.lookup(values) >= 0


def _vocabulary_tables(data: PreparedData) -> dict[str, tf.lookup.StaticHashTable]:
    """Line numbers of the vocabularies that decide whether a query is cold, -1 if unknown."""
    schema = data.features
    names = {f.of or "" for f in schema.item_histories} | {f.name for f in schema.user_ids}
    return {
        name: _lines(data.directory / data.vocabularies[name].path)
        for name in sorted(names)
        # TensorFlow refuses an empty file; a vocabulary without values knows nothing.
        if data.vocabularies[name].size
    }


def _lines(file: Path) -> tf.lookup.StaticHashTable:
    whole, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
    initializer = tf.lookup.TextFileInitializer(str(file), tf.string, whole, tf.int64, number)
    return tf.lookup.StaticHashTable(initializer, default_value=-1)


def _latest(history: tf.Tensor, happened: tf.Tensor, length: int) -> tf.Tensor:
    """Values of the last `length` events, padded at the end to `[batch, length]`."""
    values = tf.ragged.boolean_mask(history, happened)
    return values[:, -length:].to_tensor("", shape=[None, length])


def _largest(k: tf.Tensor) -> tf.Tensor:
    """The largest of `[batch]` or `[]`, 0 in an empty batch."""
    return tf.maximum(tf.reduce_max(k), 0)


def _widened(rows: tf.Tensor, scores: tf.Tensor, width: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Fill up to `[batch, width]` with row 0 and score -inf."""
    missing = [[0, 0], [0, tf.maximum(width - tf.shape(rows)[1], 0)]]
    return tf.pad(rows, missing), tf.pad(scores, missing, constant_values=-np.inf)
