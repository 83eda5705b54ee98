"""What may be returned beside exclusions: what the filters of a request pass, and is available."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from recsys.config import Export
from recsys.dataset import Corpus
from recsys.schema import Schema, filter_input
from serving_export.filters import Between, OneOf, item_filters
from serving_export.unavailable import FILE, Unavailable, listing

#: What is asked for passes less often among a query's candidates than among all items; a bit more.
_SLACK = 1.5


class Restrictions(tf.Module):
    """Says how many candidates to fetch, and which of them may be returned.

    Args:
        filters: by feature name.
        unavailable: None where the model carries no list.
        overfetch: times as many candidates as are wanted, at most.
    """

    def __init__(
        self,
        filters: Mapping[str, OneOf | Between],
        unavailable: Unavailable | None,
        overfetch: int,
    ) -> None:
        super().__init__()
        self._filters = dict(filters)
        self._unavailable = unavailable
        self._overfetch = overfetch

    def inputs(self) -> dict[str, tf.TensorSpec]:
        """Further inputs of the signatures."""
        return {filter_input(n): f.spec(filter_input(n)) for n, f in self._filters.items()}

    def fetched(self, request: Mapping[str, tf.Tensor], k: tf.Tensor) -> tf.Tensor:
        """Candidates to fetch so that about `k` may be returned, int32 `[batch]`.

        As many as the share of the corpus tells that passes for each query; `[]` where that and
        `k` are the same for all.
        """
        share = tf.ones([], tf.float32)
        for name, one in self._filters.items():
            share *= one.share(request[filter_input(name)])
        if self._unavailable is not None:
            share *= 1.0 - self._unavailable.share()
        times = tf.where(share < 1.0, tf.minimum(_SLACK / share, float(self._overfetch)), 1.0)
        return tf.cast(tf.math.ceil(tf.cast(k, tf.float32) * times), tf.int32)

    def allow(self, request: Mapping[str, tf.Tensor], rows: tf.Tensor) -> tf.Tensor:
        """Which corpus rows may be returned; rows are `[batch, n]`, or `[1, n]` for all queries.

        Returns:
            Bool `[batch, n]`, or `[1, n]` where rows are and there is no filter.
        """
        allowed = tf.ones_like(rows, tf.bool)
        for name, one in self._filters.items():
            allowed &= one.passes(request[filter_input(name)], rows)
        if self._unavailable is not None:
            allowed &= tf.logical_not(self._unavailable.among(rows))
        return allowed

    def describe(self) -> dict[str, Any]:
        """Part of the contract: each filter by feature name, with its input, and the list."""
        filters = {n: {"input": filter_input(n)} | f.describe() for n, f in self._filters.items()}
        return ({"filters": filters} if filters else {}) | (
            {"availability": True} if self._unavailable is not None else {}
        )


def restrictions(
    settings: Export, corpus: Corpus, schema: Schema, scratch: Path
) -> Restrictions | None:
    """Make what a config asks for; None if that is nothing.

    Args:
        settings: `filters`, `availability`, `overfetch`.
        corpus: candidates.
        schema: with the features to filter by.
        scratch: folder for an empty list of what is not available, until the model is saved.

    Raises:
        ArtifactError: no item has a value of a feature to filter by.
    """
    if not settings.filters and not settings.availability:
        return None
    filters = item_filters(corpus, [schema[name] for name in settings.filters])
    unavailable = None
    if settings.availability:
        (scratch / FILE).write_text(listing([]), "utf-8")
        unavailable = Unavailable(scratch / FILE, corpus.item)
    return Restrictions(filters, unavailable, settings.overfetch)
