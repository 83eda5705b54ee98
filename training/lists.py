"""Lists of candidates to train, calibrate and judge the second stage on.

A list is a request with the best that retrieval finds for it, in its own order: what the second
stage will be given in serving, not candidates at random, which are too easy to tell from the label.
A label that retrieval does not find is not put into its list: in serving it would not be there.

Which requests may be learned from? Retrieval has learned the labels of the training window by
heart; there it puts them on top, and a ranker would learn to trust it blindly. So the lists are
those of the validation window, found by the towers that have not learned its labels: those before
a refit. (They chose the epoch by them, which is one number.) What the lists hold of items ends
where the window begins, see `recsys.item_statistics`. The latest requests are held out, to choose
the epoch of the ranker and to calibrate it; the test window is touched by neither.

Lists go to disk block by block, so memory does not grow with their length.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import PreparedData
from recsys.dataset import Interactions, feature_spec, named_corruption, parse_examples
from recsys.ranks import Candidates, DotProduct, candidate_lists
from training.outcomes import Outcomes

logger = logging.getLogger(__name__)

TRAIN, HELD_OUT = "train", "held_out"
_SHUFFLED = 20_000
_PARTS = 2**16


@dataclass(frozen=True, slots=True)
class Lists:
    """Written lists.

    Attributes:
        folder: with a file for each part, `train` and `held_out`.
        depth: candidates of each list.
        requests: lists of each part.
        with_label: those of them that hold their label.
        score_mean: of the retrieval scores of `train`.
        score_std: of them.
        positives: candidates of each part with each outcome, `[tasks]`; of the label where there
            are no tasks.
    """

    folder: Path
    depth: int
    requests: dict[str, int]
    with_label: dict[str, int]
    score_mean: float
    score_std: float
    positives: dict[str, NDArray[np.int64]]
    tasks: int = 0

    def read(self, data: PreparedData, part: str, batch_size: int) -> tf.data.Dataset:
        """Batches of raw requests: query features, and what `write_lists` adds, in file order."""
        return self._batches(data, self._records(part), batch_size)

    def shuffled(
        self, data: PreparedData, part: str, batch_size: int, seed: int
    ) -> tf.data.Dataset:
        """The same in another order each time."""
        records = self._records(part).shuffle(_SHUFFLED, seed=seed)
        return self._batches(data, records, batch_size)

    def _records(self, part: str) -> tf.data.Dataset:
        return tf.data.TFRecordDataset(str(_file(self.folder, part)))

    def _batches(
        self, data: PreparedData, records: tf.data.Dataset, batch_size: int
    ) -> tf.data.Dataset:
        spec = feature_spec(data.features.query) | {
            "candidates": tf.io.FixedLenFeature([self.depth], tf.int64),
            "retrieval_scores": tf.io.FixedLenFeature([self.depth], tf.float32),
            "label_place": tf.io.FixedLenFeature([], tf.int64),
            "weight": tf.io.FixedLenFeature([], tf.float32, 1.0),
        }
        if self.tasks:
            spec["task_labels"] = tf.io.FixedLenFeature([self.depth, self.tasks], tf.int64)

        def parse(batch: tf.Tensor) -> dict[str, tf.Tensor]:
            parsed = parse_examples(batch, spec)
            numbers = {n: tf.cast(parsed[n], tf.int32) for n in ("candidates", "label_place")}
            return parsed | numbers

        return records.batch(batch_size).map(parse, num_parallel_calls=tf.data.AUTOTUNE)


@dataclass(frozen=True, slots=True)
class Requests:
    """What lists are made of.

    Attributes:
        queries: the validation split.
        held_out: `[n]` which of them are held out.
        outcomes: what followed them, where there are tasks.
    """

    queries: Interactions
    held_out: NDArray[np.bool_]
    outcomes: Outcomes | None = None


def write_lists(
    data: PreparedData, scorer: DotProduct, requests: Requests, depth: int, folder: Path
) -> Lists:
    """Write the lists of the validation queries.

    A record is that of the query with `candidates` (corpus rows, best first, -1 for none),
    `retrieval_scores`, and `label_place`, where the label is among them, or -1. With outcomes it
    has `task_labels` too, 1 for each candidate with each outcome, and any is a label of the list.

    Args:
        data: whose validation split is read.
        scorer: of these queries, which has not learned from them.
        requests: the validation split.
        depth: candidates of a list, no more than there are items.
        folder: to write to.
    """
    folder.mkdir(parents=True)
    queries, held_out, outcomes = requests.queries, requests.held_out, requests.outcomes
    num_items = len(scorer.candidates)
    found = np.zeros(len(queries), bool)
    moments = np.zeros(3)
    masks = {TRAIN: ~held_out, HELD_OUT: held_out}
    num_tasks = len(outcomes.tasks) if outcomes else 0
    positives = {part: np.zeros(max(num_tasks, 1), np.int64) for part in masks}
    parts = {part: tf.io.TFRecordWriter(str(_file(folder, part))) for part in (TRAIN, HELD_OUT)}
    with named_corruption(data, data.validation):
        records = _records(data)
        for block in candidate_lists("lists", scorer, queries, num_items, depth):
            places = label_places(block.items, queries.label[block.queries])
            labels = _labels(block, places, outcomes)
            found[block.queries] = labels.any(axis=(1, 2))
            own = np.isfinite(block.scores) & ~held_out[block.queries][:, np.newaxis]
            scores = block.scores[own].astype(np.float64)
            moments += [scores.size, scores.sum(), (scores**2).sum()]
            extended = _extended(records, block, places, labels if outcomes else None)
            for held, record in zip(held_out[block.queries], extended, strict=True):
                parts[HELD_OUT if held else TRAIN].write(record)
            for part, mask in masks.items():
                positives[part] += labels[mask[block.queries]].sum(axis=(0, 1))
    for writer in parts.values():
        writer.close()
    count, total, squares = moments
    mean = total / max(count, 1)
    return Lists(
        folder=folder,
        depth=depth,
        requests={part: int(np.count_nonzero(own)) for part, own in masks.items()},
        with_label={part: int(np.count_nonzero(found & own)) for part, own in masks.items()},
        score_mean=float(mean),
        score_std=float(np.sqrt(max(squares / max(count, 1) - mean**2, 0))),
        positives=positives,
        tasks=num_tasks,
    )


def latest(queries: Interactions, share: float, timed: bool) -> NDArray[np.bool_]:
    """Which queries are held out, `[n]`: about the latest share of them.

    Without time, or where nearly all queries have the same one, it is a share of the users.
    """
    if timed and queries.at is not None and len(queries):
        chosen: NDArray[np.bool_] = queries.at > np.quantile(queries.at, 1 - share, method="lower")
        if chosen.mean() > share / 4:
            return chosen
        logger.info("validation queries are of about one moment: users are held out, not times")
    numbers = [zlib.crc32(bytes(user)) % _PARTS for user in queries.user_id]
    return np.array(numbers) < share * _PARTS


def label_places(items: NDArray[np.int32], labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Place of each label among its candidates, `[n]`; -1 where it is not among them.

    >>> label_places(np.array([[4, 2], [1, -1]]), np.array([2, 3])).tolist()
    [1, -1]
    """
    hits = (items == labels[:, np.newaxis]) & (items >= 0)
    return np.where(hits.any(axis=1), hits.argmax(axis=1), -1).astype(np.int32)


def _records(data: PreparedData) -> Iterator[bytes]:
    records: Iterator[bytes] = tf.data.TFRecordDataset(
        data.files(data.validation)
    ).as_numpy_iterator()
    return records


def _labels(
    block: Candidates, places: NDArray[np.int32], outcomes: Outcomes | None
) -> NDArray[np.bool_]:
    """What is to be learned of each candidate, `[queries, candidates, tasks]`."""
    if outcomes is not None:
        return outcomes.of(block.queries, block.items)
    return (places[:, np.newaxis] == np.arange(block.items.shape[1]))[..., np.newaxis]


def _extended(
    records: Iterator[bytes],
    block: Candidates,
    places: NDArray[np.int32],
    labels: NDArray[np.bool_] | None,
) -> Iterator[bytes]:
    for row, (items, scores, place) in enumerate(
        zip(block.items, block.scores, places, strict=True)
    ):
        example = tf.train.Example.FromString(next(records))
        added: dict[str, Any] = example.features.feature
        added["candidates"].int64_list.value.extend(items.tolist())
        added["retrieval_scores"].float_list.value.extend(scores.tolist())
        added["label_place"].int64_list.value.append(int(place))
        if labels is not None:
            added["task_labels"].int64_list.value.extend(labels[row].astype(int).ravel().tolist())
        yield example.SerializeToString()


def _file(folder: Path, part: str) -> Path:
    return folder / f"{part}.tfrecord"
