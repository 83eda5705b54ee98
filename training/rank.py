"""Train the second stage: lists of the validation window, the ranker, its calibration."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import (
    ArtifactError,
    PreparedData,
    TrainedModel,
    TrainedRanker,
    check_same_schema,
)
from recsys.atomic import replaced
from recsys.calibration import Calibration, fit_calibration
from recsys.config import RunConfig
from recsys.dataset import Corpus, Interactions, read_corpus, read_interactions, read_sequences
from recsys.features import FeatureEncoder
from recsys.item_statistics import item_statistics, standardised
from recsys.models.ranker_features import KnownItems
from recsys.models.ranking import Ranker
from recsys.ranking_config import Ranking
from recsys.ranks import DotProduct
from training.callbacks import Progress
from training.embeddings import two_tower_scorer
from training.list_quality import list_quality
from training.lists import HELD_OUT, TRAIN, Lists, latest, write_lists

logger = logging.getLogger(__name__)

_RANKER, _LISTS = "ranker", "lists"
_BATCH = 256


def rank(
    config: RunConfig, data: PreparedData, model: TrainedModel, directory: Path
) -> TrainedRanker:
    """Train a ranker on what the towers retrieve, choose its epoch, calibrate it, save it.

    Args:
        config: with a `ranking` section.
        data: that the towers were trained on.
        model: the towers; those before a refit where there was one.
        directory: replaced as a whole: `lists/`, `ranker/` and the manifest. A training that was
            killed begins anew; it is short.

    Raises:
        ArtifactError: model and data differ in their schema, there was a refit without a `ranking`
            section, or retrieval finds no label to learn from.
    """
    settings = config.ranking
    assert settings is not None, "the step belongs to configs with a `ranking` section"
    check_same_schema(model, data)
    if config.train.refit and model.before_refit is None:
        raise ArtifactError(
            f"{model.directory} holds only towers that have learned the validation labels, which "
            "are to train the ranker: run `recsys fit` again with the `ranking` section"
        )
    tf.keras.utils.set_random_seed(config.seed)
    tf.config.experimental.enable_op_determinism()
    corpus = read_corpus(data)
    with replaced(directory) as folder:
        queries = read_interactions(data, data.validation, corpus)
        held_out = latest(queries, settings.held_out, data.validation.last_at is not None)
        scorer = _scorer(data, model, corpus, queries)
        depth = min(settings.candidates, len(corpus))
        lists = write_lists(data, scorer, queries, held_out, depth, folder / _LISTS)
        _require_labels(lists)
        before, after = _statistics(data, corpus)
        ranker = Ranker(
            settings,
            data.features,
            FeatureEncoder(data),
            KnownItems(corpus, scorer.candidates, standardised(before, before)),
            config.seed,
            prior=_log_odds(lists),
        )
        ranker.features.standardise_scores(lists.score_mean, lists.score_std)
        trained = _train(ranker, settings, data, lists, config.seed)
        calibration, quality = _calibrate(ranker, data, lists, queries.user[held_out])
        ranker.save_ranker(folder / _RANKER, standardised(after, before), calibration)
        manifest = TrainedRanker(
            directory=folder,
            ranker=_RANKER,
            lists=lists.requests,
            with_label=lists.with_label,
            candidates=settings.candidates,
            features=data.features,
            best_epoch=trained.best_epoch,
            curves=trained.curves,
            held_out=quality,
            versions={name: version(name) for name in ("tensorflow", "tensorflow-recommenders")},
        ).save()
    return manifest.model_copy(update={"directory": directory})


def _scorer(
    data: PreparedData, model: TrainedModel, corpus: Corpus, queries: Interactions
) -> DotProduct:
    """Retrieval of the validation queries, whose labels it has not learned."""
    towers = model.directory / (model.before_refit or model.towers)
    return two_tower_scorer(towers, data, corpus, queries.history, data.validation)


def _require_labels(lists: Lists) -> None:
    for part, purpose in ((TRAIN, "train"), (HELD_OUT, "calibrate")):
        found, of = lists.with_label[part], lists.requests[part]
        logger.info("%s: %d of %d lists hold their label", part, found, of)
        if not found:
            raise ArtifactError(
                f"retrieval finds none of the {of} labels of validation queries that are to "
                f"{purpose} the ranker among its best {lists.depth}: raise ranking.candidates, "
                "lengthen the validation window, or change ranking.held_out"
            )


def _statistics(
    data: PreparedData, corpus: Corpus
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Statistics as of the beginning of validation, and as of its end."""
    timed = data.train.last_at is not None
    train = read_sequences(data, data.train, corpus)
    recent = read_sequences(data, data.recent, corpus)
    before = item_statistics([train], len(corpus), timed)
    return before, item_statistics([train, recent], len(corpus), timed)


def _log_odds(lists: Lists) -> float:
    share = lists.with_label[TRAIN] / (lists.requests[TRAIN] * lists.depth)
    return float(np.log(share / (1 - share)))


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
        self._loss = tf.function(self.model.compute_loss)

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
    if settings.loss == "listwise":
        # The others have no loss, and cost as much.
        batches, held_out = _with_label(batches, size), _with_label(held_out, _BATCH)
        steps = -(-lists.with_label[TRAIN] // size)
    batches = batches.map(encode, num_parallel_calls=tf.data.AUTOTUNE)
    held_out = held_out.map(encode)
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


def _with_label(batches: tf.data.Dataset, size: int) -> tf.data.Dataset:
    return batches.unbatch().filter(lambda request: request["label_place"] >= 0).batch(size)


def _calibrate(
    ranker: Ranker, data: PreparedData, lists: Lists, users: NDArray[np.int64]
) -> tuple[Calibration, dict[str, dict[str, float]]]:
    """Fit the calibration on what is held out, and measure there."""
    score = tf.function(ranker)
    batches = [
        {k: raw[k].numpy() for k in ("candidates", "retrieval_scores", "label_place")}
        | {"logits": score(ranker.features(raw)).numpy()}
        for raw in lists.read(data, HELD_OUT, _BATCH)
    ]
    columns = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    relevant = columns["label_place"][:, np.newaxis] == np.arange(lists.depth)
    present = columns["candidates"] >= 0
    calibration = fit_calibration(relevant[present], columns["logits"][present])
    logger.info("calibration: log odds are %.3f x + %.3f", *calibration)
    scores = {
        "ranker": calibration(columns["logits"]),
        "uncalibrated": columns["logits"],
        "retrieval": columns["retrieval_scores"],
    }
    return calibration, {
        name: list_quality(relevant, present, values, users) for name, values in scores.items()
    }
