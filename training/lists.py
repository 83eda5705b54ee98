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

Where the log has what was shown, these lists take the place of those of retrieval, with the items
and clicks that they had; all else, the window included, is the same.

Lists go to disk block by block, so memory does not grow with their length.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import Examples, PreparedData
from recsys.dataset import Interactions, feature_spec, named_corruption, parse_examples
from recsys.ranks import Candidates, DotProduct, candidate_lists
from training.outcomes import Outcomes
from training.shown import Shown

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
        listed: their candidates in all.
        with_label: those of them that hold their label.
        score_mean: of the retrieval scores of `train`.
        score_std: of them.
        positives: candidates of each part with each outcome, `[tasks]`; of the label where there
            are no tasks.
        tasks: labels of each candidate; 0 where a list has one label, known by its place.
        positions: whether it is told where candidates were shown.
        values: fields of what candidates were when they were shown.
    """

    folder: Path
    depth: int
    requests: dict[str, int]
    listed: dict[str, int]
    with_label: dict[str, int]
    score_mean: float
    score_std: float
    positives: dict[str, NDArray[np.int64]]
    tasks: int = 0
    positions: bool = False
    values: tuple[str, ...] = ()

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
        if self.positions:
            spec["positions"] = tf.io.FixedLenFeature([self.depth], tf.int64)
        spec |= {n: tf.io.FixedLenFeature([self.depth], tf.float32) for n in self.values}
        whole = [n for n in ("candidates", "label_place", "positions") if n in spec]

        def parse(batch: tf.Tensor) -> dict[str, tf.Tensor]:
            parsed = parse_examples(batch, spec)
            return parsed | {name: tf.cast(parsed[name], tf.int32) for name in whole}

        return records.batch(batch_size).map(parse, num_parallel_calls=tf.data.AUTOTUNE)


@dataclass(frozen=True, slots=True)
class Requests:
    """What lists are made of.

    Attributes:
        split: what is asked, of the validation window.
        queries: of this split.
        held_out: `[n]` which of them are held out.
        outcomes: what followed them, where there are tasks.
        shown: what they were shown, where the log has it.
    """

    split: Examples
    queries: Interactions
    held_out: NDArray[np.bool_]
    outcomes: Outcomes | None = None
    shown: Shown | None = None

    @property
    def num_tasks(self) -> int:
        """Labels of each candidate; 0 where a list has one label, known by its place."""
        return len(self.outcomes.tasks) if self.outcomes else int(self.shown is not None)

    def lists(self, scorer: DotProduct, depth: int) -> Iterator[Candidates]:
        """Yield what was shown, or the best of retrieval, in file order."""
        if self.shown is not None:
            return self.shown.scored(scorer)
        return candidate_lists("lists", scorer, self.queries, len(scorer.candidates), depth)

    def labels(self, block: Candidates) -> dict[str, NDArray[Any]]:
        """What is to be learned of the candidates, as a record tells it."""
        own = block.queries
        told: dict[str, NDArray[Any]] = {}
        if self.shown is not None:
            told["label_place"] = np.full(len(block.items), -1)
            told["task_labels"] = self.shown.clicked[own][..., np.newaxis]
            told["positions"] = self.shown.positions[own]
            return told | {name: values[own] for name, values in self.shown.values.items()}
        told["label_place"] = label_places(block.items, self.queries.label[own])
        if self.outcomes is not None:
            told["task_labels"] = self.outcomes.of(own, block.items)
        return told


def write_lists(
    data: PreparedData, scorer: DotProduct, requests: Requests, depth: int, folder: Path
) -> Lists:
    """Write the lists of the validation window.

    A record is that of the query with `candidates` (corpus rows, best first, -1 for none),
    `retrieval_scores`, and `label_place`, where the label is among them, or -1. With outcomes it
    has `task_labels` too, 1 for each candidate with each outcome, and any is a label of the list.
    Of shown lists the one outcome is the click, and `positions` and numbers `as_shown` stand beside
    it.

    Args:
        data: that the requests are of.
        scorer: of these queries, which has not learned from them.
        requests: of the validation window.
        depth: candidates of a list, no more than there are items; as many as shown lists have.
        folder: to write to.
    """
    folder.mkdir(parents=True)
    held_out = requests.held_out
    found, listed = np.zeros(len(held_out), bool), np.zeros(len(held_out), np.int64)
    moments = np.zeros(3)
    masks = {TRAIN: ~held_out, HELD_OUT: held_out}
    positives = {part: np.zeros(max(requests.num_tasks, 1), np.int64) for part in masks}
    parts = {part: tf.io.TFRecordWriter(str(_file(folder, part))) for part in (TRAIN, HELD_OUT)}
    with named_corruption(data, requests.split):
        records = tf.data.TFRecordDataset(data.files(requests.split)).as_numpy_iterator()
        for block in requests.lists(scorer, depth):
            told = requests.labels(block)
            labels = _wanted(told, depth)
            found[block.queries] = labels.any(axis=(1, 2))
            listed[block.queries] = np.count_nonzero(block.items >= 0, axis=1)
            own = np.isfinite(block.scores) & ~held_out[block.queries][:, np.newaxis]
            scores = block.scores[own].astype(np.float64)
            moments += [scores.size, scores.sum(), (scores**2).sum()]
            extended = _extended(records, block, told)
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
        listed={part: int(listed[own].sum()) for part, own in masks.items()},
        with_label={part: int(np.count_nonzero(found & own)) for part, own in masks.items()},
        score_mean=float(mean),
        score_std=float(np.sqrt(max(squares / max(count, 1) - mean**2, 0))),
        positives=positives,
        tasks=requests.num_tasks,
        positions=data.impressions is not None and data.impressions.positions,
        values=() if requests.shown is None else tuple(requests.shown.values),
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


def _wanted(told: Mapping[str, NDArray[Any]], depth: int) -> NDArray[np.bool_]:
    """What is to be learned of each candidate, `[queries, candidates, tasks]`."""
    if "task_labels" in told:
        return told["task_labels"]
    wanted: NDArray[np.bool_] = told["label_place"][:, np.newaxis] == np.arange(depth)
    return wanted[..., np.newaxis]


def _extended(
    records: Iterator[bytes], block: Candidates, told: Mapping[str, NDArray[Any]]
) -> Iterator[bytes]:
    columns = {"candidates": block.items, "retrieval_scores": block.scores, **told}
    for row in range(len(block.items)):
        example = tf.train.Example.FromString(next(records))
        added: dict[str, Any] = example.features.feature
        for name, values in columns.items():
            if np.issubdtype(values.dtype, np.floating):
                added[name].float_list.value[:] = values[row].tolist()
            else:
                added[name].int64_list.value[:] = values[row].astype(int).ravel().tolist()
        yield example.SerializeToString()


def _file(folder: Path, part: str) -> Path:
    return folder / f"{part}.tfrecord"
