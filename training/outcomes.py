"""What users did next with the candidates of their requests: the labels of several tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import ArtifactError, Examples, PreparedData
from recsys.dataset import Corpus, named_corruption, parse_examples

_READ_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What followed each query of a split, in file order.

    Attributes:
        tasks: event types.
        query: `[outcomes]` of which query, ascending.
        item: `[outcomes]` corpus rows, -1 for none.
        task: `[outcomes]` which of the tasks.
    """

    tasks: tuple[str, ...]
    query: NDArray[np.int64]
    item: NDArray[np.int32]
    task: NDArray[np.int64]

    def of(self, queries: slice, items: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Tell which candidates had which outcome.

        Args:
            queries: which queries.
            items: `[queries, candidates]` corpus rows, -1 for none; none comes twice.

        Returns:
            `[queries, candidates, tasks]`.
        """
        first, last = np.searchsorted(self.query, [queries.start, queries.stop])
        query = self.query[first:last] - queries.start
        hits = (items[query] == self.item[first:last, np.newaxis]) & (items[query] >= 0)
        outcome, place = np.nonzero(hits)
        found = np.zeros((*items.shape, len(self.tasks)), bool)
        found[query[outcome], place, self.task[first:last][outcome]] = True
        return found


def read_outcomes(
    data: PreparedData, examples: Examples, corpus: Corpus, tasks: Sequence[str]
) -> Outcomes:
    """Read the outcomes of all queries of a split.

    Raises:
        ArtifactError: the data were prepared without tasks, or a shard is corrupt.
    """
    if not data.outcomes:
        raise ArtifactError(
            f"{data.directory} was prepared without ranking.tasks, so it does not tell what users "
            "did next: run `recsys prepare` again with the `ranking` section"
        )
    names = ("outcome_items", "outcome_events")
    spec: dict[str, Any] = {name: tf.io.RaggedFeature(tf.string) for name in names}
    rows, numbers = corpus.rows(), {task.encode(): n for n, task in enumerate(tasks)}
    parts, begin = [], 0
    with named_corruption(data, examples):
        for records in tf.data.TFRecordDataset(data.files(examples)).batch(_READ_BATCH):
            listed, events = (parse_examples(records, spec)[name] for name in names)
            query = begin + listed.value_rowids().numpy()
            task = np.array([numbers.get(e, -1) for e in events.values.numpy()], np.int64)
            own = task >= 0
            parts.append((query[own], rows.lookup(listed.values).numpy()[own], task[own]))
            begin += len(records)
    return Outcomes(tuple(tasks), *(np.concatenate(column) for column in zip(*parts, strict=True)))
