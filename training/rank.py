"""Train the second stage: lists of the validation window, the ranker, its calibration."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from scipy.special import logit

from recsys.artifacts import (
    ArtifactError,
    Examples,
    PreparedData,
    TrainedModel,
    TrainedRanker,
    check_same_schema,
)
from recsys.atomic import replaced
from recsys.calibration import Calibration, fit_calibration
from recsys.config import RunConfig
from recsys.dataset import Corpus, read_corpus, read_interactions, read_sequences
from recsys.features import FeatureEncoder
from recsys.item_statistics import click_statistics, item_statistics, standardised
from recsys.models.multitask import Multitask
from recsys.models.ranker_features import KnownItems
from recsys.models.ranking import Ranker
from recsys.ranking_config import Ranking
from recsys.ranks import DotProduct
from training.callbacks import Progress
from training.embeddings import two_tower_scorer
from training.list_quality import list_quality
from training.lists import HELD_OUT, TRAIN, Lists, Requests, latest, write_lists
from training.outcomes import read_outcomes
from training.shown import read_item_counts, read_shown

logger = logging.getLogger(__name__)

_RANKER, _LISTS = "ranker", "lists"
_BATCH = 256
#: What a record has of each candidate.
_LISTED = ("candidates", "retrieval_scores", "task_labels", "positions")


def rank(
    config: RunConfig, data: PreparedData, model: TrainedModel, directory: Path
) -> TrainedRanker:
    """Train a ranker on what towers retrieve, or on what was shown; choose its epoch, calibrate.

    Args:
        config: with a `ranking` section.
        data: that the towers were trained on.
        model: the towers; those before a refit where there was one.
        directory: replaced as a whole: `lists/`, `ranker/` and the manifest. A training that was
            killed begins anew; it is short.

    Raises:
        ArtifactError: model and data differ in their schema, there was a refit without a `ranking`
            section, the data do not tell the outcomes that tasks need, or retrieval finds no label
            to learn from, or of what was shown nothing was clicked.
    """
    settings = config.ranking
    assert settings is not None, "the step belongs to configs with a `ranking` section"
    check_same_schema(model, data)
    if config.train.refit and model.before_refit is None:
        raise ArtifactError(
            f"{model.directory} holds only towers that have learned the validation labels, which "
            "are to train the ranker: run `recsys fit` again"
        )
    tf.keras.utils.set_random_seed(config.seed)
    tf.config.experimental.enable_op_determinism()
    corpus = read_corpus(data)
    with replaced(directory) as folder:
        requests, depth = _requests(settings, data, corpus)
        scorer = _scorer(data, model, corpus, requests)
        tasks = tuple(settings.tasks)
        lists = write_lists(data, scorer, requests, depth, folder / _LISTS)
        (_require_labels if requests.shown is None else _require_clicks)(lists, settings.tasks)
        before, after = window_statistics(data, corpus)
        ranker = (Multitask if tasks else Ranker)(
            settings,
            data.features,
            FeatureEncoder(data),
            KnownItems(corpus, scorer.candidates, standardised(before, before)),
            config.seed,
            prior=_log_odds(lists),
        )
        ranker.features.standardise_scores(lists.score_mean, lists.score_std)
        trained = _train(ranker, settings, data, lists, config.seed)
        users = requests.queries.user[requests.held_out]
        calibrated = _calibrate(ranker, data, lists, users, settings.task_order)
        statistics = standardised(after, before)
        ranker.save_ranker(
            folder / _RANKER, statistics, *calibrated.calibrations, values=lists.values
        )
        manifest = TrainedRanker(
            directory=folder,
            ranker=_RANKER,
            lists=lists.requests,
            with_label=lists.with_label,
            candidates=settings.candidates,
            features=data.features,
            best_epoch=trained.best_epoch,
            curves=trained.curves,
            held_out=calibrated.by_scorer,
            tasks=dict(zip(tasks, calibrated.by_output, strict=True)) if tasks else {},
            versions={name: version(name) for name in ("tensorflow", "tensorflow-recommenders")},
        ).save()
    return manifest.model_copy(update={"directory": directory})


def _requests(settings: Ranking, data: PreparedData, corpus: Corpus) -> tuple[Requests, int]:
    """Requests of the validation window, and how long their lists are at most."""
    depth = min(settings.candidates, len(corpus))
    split: Examples = data.validation
    outcomes = shown = None
    if data.impressions is not None:
        split, depth = data.impressions.validation, min(data.impressions.longest, depth)
        shown = read_shown(data, split, corpus, depth)
    elif settings.tasks:
        outcomes = read_outcomes(data, split, corpus, tuple(settings.tasks))
    queries = read_interactions(data, split, corpus)
    held_out = latest(queries, settings.held_out, split.last_at is not None)
    return Requests(split, queries, held_out, outcomes, shown), depth


def _scorer(
    data: PreparedData, model: TrainedModel, corpus: Corpus, requests: Requests
) -> DotProduct:
    """Retrieval of the validation window, whose labels it has not learned."""
    towers = model.directory / (model.before_refit or model.towers)
    return two_tower_scorer(towers, data, corpus, requests.queries.history, requests.split)


def _require_clicks(lists: Lists, tasks: Mapping[str, float]) -> None:
    for part, purpose in ((TRAIN, "train"), (HELD_OUT, "calibrate")):
        clicks, listed = int(lists.positives[part].sum()), lists.listed[part]
        logger.info(
            "%s: %d shown lists, %d items, %d clicks", part, lists.requests[part], listed, clicks
        )
        if not 0 < clicks < listed:
            raise ArtifactError(
                f"{clicks} of the {listed} shown items that are to {purpose} the ranker were "
                "clicked, some and not all are needed: lengthen the validation window, or change "
                "ranking.held_out"
            )


def _require_labels(lists: Lists, tasks: Mapping[str, float]) -> None:
    for part, purpose in ((TRAIN, "train"), (HELD_OUT, "calibrate")):
        found, of = lists.with_label[part], lists.requests[part]
        logger.info("%s: %d of %d lists hold their label", part, found, of)
        for task, positives in zip(tasks, lists.positives[part], strict=False):
            logger.info("%s: %d candidates with %s", part, positives, task)
        # A task of weight 0 is only measured, where it can be.
        counted = zip(tasks.items(), lists.positives[part], strict=False)
        labels = [task for (task, weight), n in counted if weight and not n]
        if found and not labels and lists.positives[part].any():
            continue
        what = f"events {labels[0]!r} after {of}" if labels else f"{of} labels of"
        raise ArtifactError(
            f"retrieval finds none of the {what} validation queries that are to {purpose} the "
            f"ranker among its best {lists.depth}: raise ranking.candidates, lengthen the "
            f"validation window, or change ranking.held_out{' or ranking.tasks' if tasks else ''}"
        )


def window_statistics(
    data: PreparedData, corpus: Corpus
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Statistics as of the beginning of validation, and as of its end, `[num_items, any]`."""
    timed = data.train.last_at is not None
    train = read_sequences(data, data.train, corpus)
    recent = read_sequences(data, data.recent, corpus)
    before = item_statistics([train], len(corpus), timed)
    after = item_statistics([train, recent], len(corpus), timed)
    if data.impressions is None:
        return before, after
    times = read_item_counts(data, corpus)
    earlier, all_times = ([part[:n].sum(axis=0) for part in times] for n in (1, 2))
    return (
        np.concatenate([before, click_statistics(*earlier)], axis=1),
        np.concatenate([after, click_statistics(*all_times)], axis=1),
    )


def _log_odds(lists: Lists) -> NDArray[np.float64]:
    """Where the logits begin, `[outputs]`."""
    share = np.maximum(lists.positives[TRAIN], 1) / max(lists.listed[TRAIN], 2)
    odds: NDArray[np.float64] = logit(share)
    return odds


class _BestEpoch(tf.keras.callbacks.Callback):
    """Measure each epoch on what is held out; in the end the model has the best epoch's weights."""

    def __init__(self, held_out: tf.data.Dataset, patience: int) -> None:
        super().__init__()
        self._held_out = held_out
        self._patience = patience
        self._weights: list[NDArray[np.float32]] = []
        self.best_epoch = 0
        self.curves: dict[str, list[float]] = {"loss": [], "held_out_loss": []}

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        losses = [float(self._loss(batch)) for batch in self._held_out]
        self.curves["loss"].append(float((logs or {})["loss"]))
        self.curves["held_out_loss"].append(float(np.mean(losses)))
        best = min(self.curves["held_out_loss"])
        logger.info("ranker, epoch %d: held-out loss %.5f", epoch + 1, np.mean(losses))
        if self.curves["held_out_loss"][-1] == best:
            self.best_epoch = epoch + 1
            self._weights = [w.numpy() for w in self.model.trainable_variables]
        elif epoch + 1 - self.best_epoch >= self._patience:
            self.model.stop_training = True

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        # Batches differ in their longest list.
        self._loss = tf.function(self.model.compute_loss, reduce_retracing=True)

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        for variable, value in zip(self.model.trainable_variables, self._weights, strict=True):
            variable.assign(value)


def _train(
    ranker: Ranker, settings: Ranking, data: PreparedData, lists: Lists, seed: int
) -> _BestEpoch:
    encode, size = ranker.features, settings.batch_size
    batches = lists.shuffled(data, TRAIN, size, seed)
    held_out = lists.read(data, HELD_OUT, _BATCH)
    steps = -(-lists.requests[TRAIN] // size)
    if settings.loss != "pointwise":
        # The others have no loss, and cost as much.
        learned = tf.constant([weight > 0 for weight in settings.tasks.values()] or [True])
        batches = _with_label(batches, learned, size)
        held_out = _with_label(held_out, learned, _BATCH)
        steps = -(-lists.with_label[TRAIN] // size)
    trim = partial(_trimmed, listed=(*_LISTED, *lists.values))
    batches = batches.map(trim).map(encode, num_parallel_calls=tf.data.AUTOTUNE)
    held_out = held_out.map(trim).map(encode)
    best = _BestEpoch(held_out.cache(), settings.patience)
    optimizer = tf.keras.optimizers.Adam(
        settings.learning_rate, weight_decay=settings.weight_decay or None, jit_compile=False
    )
    ranker.compile(optimizer=optimizer)
    ranker.fit(
        batches.prefetch(tf.data.AUTOTUNE),
        epochs=settings.epochs,
        verbose=0,
        callbacks=[Progress(steps), best],
    )
    return best


def _with_label(batches: tf.data.Dataset, learned: tf.Tensor, size: int) -> tf.data.Dataset:
    """Lists with a label, where there are tasks with one that is learned, `[tasks]`."""

    def has_label(request: Mapping[str, tf.Tensor]) -> tf.Tensor:
        if "task_labels" in request:
            return tf.reduce_any((request["task_labels"] > 0) & learned)
        return request["label_place"] >= 0

    return batches.unbatch().filter(has_label).batch(size)


def _trimmed(requests: Mapping[str, tf.Tensor], listed: Sequence[str]) -> dict[str, tf.Tensor]:
    """A batch without the places that hold a candidate in none of its lists: they cost as much."""
    present = tf.reduce_any(requests["candidates"] >= 0, axis=0)
    width = tf.maximum(tf.reduce_sum(tf.cast(present, tf.int32)), 1)
    return {n: v[:, :width] if n in listed else v for n, v in requests.items()}


@dataclass(frozen=True, slots=True)
class _Calibrated:
    """Calibrations of the outputs, and metrics on what they were fitted on."""

    calibrations: list[Calibration]
    by_scorer: dict[str, dict[str, float]]
    by_output: list[dict[str, float]]


def _calibrate(
    ranker: Ranker,
    data: PreparedData,
    lists: Lists,
    users: NDArray[np.int64],
    order: Sequence[float],
) -> _Calibrated:
    """Fit the calibrations on what is held out, and measure there; scorers by the main output.

    The network is asked as in serving, where nobody knows a position yet.
    """
    score = tf.function(ranker.network)
    batches = [
        {
            "present": raw["candidates"].numpy() >= 0,
            "retrieval": raw["retrieval_scores"].numpy(),
            "relevant": _relevant(raw, lists),
            "logits": score(ranker.features(raw)).numpy(),
        }
        for raw in lists.read(data, HELD_OUT, _BATCH)
    ]
    columns = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    present, relevant, logits = (columns[n] for n in ("present", "relevant", "logits"))
    outputs = range(relevant.shape[-1])
    calibrations = [
        fit_calibration(relevant[present, n], logits[present, n].astype(float)) for n in outputs
    ]
    for calibration in calibrations:
        logger.info("calibration: log odds are %.3f x + %.3f", *calibration)
    main = int(np.argmax(order)) if order else 0
    odds = np.stack([c(logits[..., n]) for n, c in enumerate(calibrations)], axis=-1)
    scores = {
        "ranker": ranker.answers(tf.constant(odds, tf.float32))["scores"].numpy(),
        "uncalibrated": ranker.answers(tf.constant(logits))["scores"].numpy(),
        "retrieval": columns["retrieval"],
    }
    return _Calibrated(
        calibrations,
        {n: list_quality(relevant[..., main], present, s, users) for n, s in scores.items()},
        [list_quality(relevant[..., n], present, odds[..., n], users) for n in outputs],
    )


def _relevant(raw: Mapping[str, tf.Tensor], lists: Lists) -> NDArray[np.bool_]:
    """What is asked for, `[batch, candidates, outputs]`."""
    if lists.tasks:
        return raw["task_labels"].numpy() > 0
    places = raw["label_place"].numpy()[:, np.newaxis] == np.arange(lists.depth)
    return places[..., np.newaxis]
