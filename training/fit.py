"""Train the two towers from prepared data, under whatever strategy is in scope."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from recsys.artifacts import ArtifactError, PreparedData, Sequences, TrainedModel
from recsys.atomic import replaced
from recsys.config import RunConfig
from recsys.dataset import (
    named_corruption,
    raw_batches,
    read_corpus,
    read_interactions,
)
from recsys.features import FeatureEncoder
from recsys.judged import judgements
from recsys.metrics import per_query
from recsys.model_config import TwoTowerConfig
from recsys.models.joint import JointTwoTower
from recsys.models.retrieval import TwoTower
from recsys.models.transfer import take_over
from recsys.neighbours import neighbours
from recsys.ranks import DotProduct, rank_queries
from recsys.sequences import Order, training_batches
from recsys.shards import WHOLE, Share
from recsys.starting_model import StartingModel
from training.callbacks import (
    Checkpoints,
    EpochLog,
    FitState,
    LogCurves,
    Progress,
    Validation,
    newest_checkpoint,
)
from training.chief import coordinator, is_chief, wait_for_chief, without_strategy
from training.judged import judged_auc, require_judged
from training.optimizer import optimizer
from training.parameter_server import batches
from training.progress import advance

logger = logging.getLogger(__name__)

_VALIDATION_BATCH = 4096
_BEFORE_REFIT = "towers_before_refit"
_ENDLESS = tf.data.INFINITE_CARDINALITY
_SECONDS_PER_DAY = 86_400


def fit(
    config: RunConfig,
    data: PreparedData,
    directory: Path,
    mlflow_run_id: str | None = None,
    log_curves: LogCurves = lambda curves: None,
    watched: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> TrainedModel:
    """Train to the best validation epoch and save the towers; resume where a killed one stopped.

    Runs under the strategy that is in scope, by itself or as one of several workers that all call
    it alike. However many replicas share a global batch, the loss of each step is the same.

    Args:
        config: the run. `train.warm_start` is the folder of a `StartingModel`: its weights are
            what the training begins with, and a refit too. The optimizer begins anew, as its
            moments are of other gradients.
        data: what `prepare` made; its schema must be that of the config.
        directory: receives `checkpoints/`, `towers/` and the manifest; shared by all workers, of
            which the chief alone writes. With `train.refit` also `towers_before_refit/`, by whose
            scores a second stage is trained, and with which a later training may begin.
        mlflow_run_id: noted in the manifest.
        log_curves: called by the chief alone after each epoch, once its checkpoint exists, and
            after a restart: with the metrics of all epochs so far, so it must log none twice.
        watched: entered by the chief for as long as it works, to log what that takes.

    Raises:
        ArtifactError: the data were prepared for other features, or a shard is corrupt.
    """
    with watched() if is_chief() else nullcontext():
        return _fit(config, data, directory, mlflow_run_id, log_curves)


def _fit(
    config: RunConfig,
    data: PreparedData,
    directory: Path,
    mlflow_run_id: str | None,
    log_curves: LogCurves,
) -> TrainedModel:
    _check_schema(config, data)
    # The same seed must give the same model, also after a restart in the middle.
    _seed_all(config.seed)
    tf.config.experimental.enable_op_determinism()
    inputs = _Inputs(config, data)
    model = inputs.build_model([data.train])
    train = config.train
    checkpoints = Checkpoints(
        directory / "checkpoints", train.monitor, train.patience, train.checkpoint_steps
    )
    state = checkpoints.restore(model)
    inputs.begin(model, state, [data.train])
    log = EpochLog(checkpoints, log_curves)
    log.catch_up()
    if not state.stopped and state.epoch < train.epochs:
        around = [Validation(lambda: inputs.validate(model)), checkpoints, log]
        with named_corruption(data, data.train):
            _run(model, inputs, [data.train], train.epochs, checkpoints, around)
    state = checkpoints.restore_best(model)
    served = inputs.served(model, checkpoints)
    best = state.best(train.monitor)
    logger.info("best epoch %d: %s %.4f", state.best_epoch, train.monitor, best)
    if train.refit:
        # A second stage must not learn from scores of labels that were learned by heart, nor
        # may a later training be validated with them.
        _save_towers(served, directory / _BEFORE_REFIT)
        served = _refit(inputs, state.best_epoch, directory / "checkpoints" / "refit")
    manifest = _manifest(inputs, state, directory, mlflow_run_id)
    _save_towers(served, directory / "towers")
    if is_chief():
        manifest.save()
    wait_for_chief()
    return manifest


def _seed_all(seed: int) -> None:
    # With 0 tf.data looks whether the other seed, a tensor here, is 0 too, and cannot tell.
    tf.keras.utils.set_random_seed(seed or 2**32 - 1)


def saved(directory: Path) -> str:
    """Name of the newest checkpoint of the training in `directory`; grows as it gets on."""
    return newest_checkpoint(directory / "checkpoints")


class _Inputs:
    """What the model reads: encoded batches, and the validation queries."""

    def __init__(self, config: RunConfig, data: PreparedData) -> None:
        self.config = config
        self.data = data
        self.encoder = FeatureEncoder(data)
        self.corpus = read_corpus(data)
        self._rows = self.corpus.rows()
        self._validation = read_interactions(data, data.validation, self.corpus)
        if config.model.joint is not None:
            require_judged(data, config.model.joint)
        start = config.train.warm_start
        self.start = StartingModel.load(Path(start)) if start else None

    def steps_per_epoch(self, splits: Sequence[Sequences]) -> int:
        """Batches of one pass over these training sequences."""
        num_sequences = sum(split.num_sequences for split in splits)
        return math.ceil(num_sequences / self.config.train.global_batch_size)

    def training(
        self, splits: Sequence[Sequences], epochs: range, skip: int = 0, share: Share = WHOLE
    ) -> tf.data.Dataset:
        """Encoded batches with all that `TwoTower.compute_loss` reads, for these epochs."""
        train = self.config.train
        order = Order(epochs, self.config.seed, train.shuffle_buffer, skip)
        raw = training_batches(
            self.data, splits, train.global_batch_size, order, share, train.cache_mib
        )
        num_warm = max(1, int(np.count_nonzero(self.corpus.count)))
        joint = self.config.model.joint
        half_life = self.config.model.loss.recency_half_life_days
        moments = [split.last_at for split in splits if split.last_at is not None]
        last = max(moments).timestamp() if half_life else 0.0

        def encode(batch: dict[str, Any]) -> dict[str, Any]:
            judged = batch.pop("judged", None)
            row = self._rows.lookup(batch.pop("label"))
            # Among the validation labels are items that training never saw: they have no vector
            # of their own to be learned, and are no candidates of the loss.
            batch["weight"] = tf.where(row < num_warm, batch["weight"], 0.0)
            row = tf.where(row < num_warm, row, 0)
            if "pool" in batch:
                pool = self._rows.lookup(batch["pool"])
                batch["pool"] = tf.where(pool < num_warm, pool, 0)
            time = batch.pop("time")
            if half_life:
                age = (last - tf.cast(time, tf.float64) / 1e6) / _SECONDS_PER_DAY
                batch["weight"] *= tf.cast(2 ** (-age / half_life), tf.float32)
            encoded = self.encoder(batch) | {"row": row}
            if joint is None:
                return encoded
            told = judgements(judged, self._rows, num_warm, joint.positive)
            return encoded | {"judged": self.encoder(told)}

        encoded = raw.map(encode, num_parallel_calls=tf.data.AUTOTUNE)
        return encoded.prefetch(tf.data.AUTOTUNE)

    def build_model(self, splits: Sequence[Sequences]) -> TwoTower:
        """Build and compile the model and create all its variables."""
        model = self._with_variables(self.config.model)
        model.compile(optimizer=optimizer(self.config.train, self.steps_per_epoch(splits)))
        model.optimizer.build(model.trainable_variables)
        return model

    def served(self, model: TwoTower, checkpoints: Checkpoints) -> TwoTower:
        """Return the model that is evaluated and served: not in half precision, nor on servers.

        To be called by all workers: their variables are created together.

        Args:
            model: the weights.
            checkpoints: the best of which holds them too.
        """
        if coordinator() is not None:
            return without_strategy(lambda: _Inputs(self.config, self.data)._read(checkpoints))
        if not self.config.model.mixed_precision:
            return model
        served = self._in_float32()
        served.set_weights(model.get_weights())
        return served

    def _read(self, checkpoints: Checkpoints) -> TwoTower:
        model = self._in_float32()
        checkpoints.restore_best(model)
        return model

    def _in_float32(self) -> TwoTower:
        return self._with_variables(self.config.model.model_copy(update={"mixed_precision": False}))

    def _with_variables(self, config: TwoTowerConfig) -> TwoTower:
        model = (TwoTower if config.joint is None else JointTwoTower)(
            config,
            self.config.schema_,
            self.encoder,
            self.corpus,
            seed=self.config.seed,
            exclude_seen=self.data.exclude_seen,
        )
        for raw in raw_batches(self.data, self.data.validation, 1).take(1):
            model(self.encoder(raw))
        model.embed_corpus()
        return model

    def begin(self, model: TwoTower, state: FitState, splits: Sequence[Sequences]) -> None:
        """Give a model that no checkpoint was loaded into what it begins with."""
        if state.epoch or state.step:
            return
        if number := self.config.model.num_neighbours:
            model.connect(neighbours(self.data, splits, self.encoder, number, advance))
        if self.start is not None:
            taken = take_over(model, self.encoder, self.start.directory / self.start.towers)
            if is_chief():
                logger.info("weights of %s: %s", self.start.source, taken)

    def validate(self, model: TwoTower) -> dict[str, float]:
        """Metrics of the validation examples over the whole corpus, exactly."""
        raw = raw_batches(self.data, self.data.validation, _VALIDATION_BATCH)
        parts = []
        for batch in raw:
            parts.append(model.embed_queries(self.encoder(batch)))
            advance()
        queries = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        ranking = rank_queries(
            "validation",
            DotProduct(
                queries["embedding"],
                model.embed_corpus().numpy(),
                queries.get("repeat"),
                self._validation.history,
            ),
            self._validation,
            len(self.corpus),
            k=1,
            seed=self.config.seed,
        )
        of_retrieval = [self.config.train.monitor, self.config.registry.gate.metric]
        k = next(int(name.split("@")[1]) for name in of_retrieval if "@" in name)
        found = {n: float(values.mean()) for n, values in per_query(ranking.rank, [k]).items()}
        if isinstance(model, JointTwoTower):
            with named_corruption(self.data, self.data.recent):
                found["auc"] = judged_auc(model, self._judged)
        return found

    @cached_property
    def _judged(self) -> tf.data.Dataset:
        """The validation window as encoded batches with judged events."""
        return self.training([self.data.recent], range(1))


def _refit(inputs: _Inputs, epochs: int, directory: Path) -> TwoTower:
    """Train a new model on training and validation labels, for as many epochs as were best.

    Returns:
        The model that is served.
    """
    splits = [inputs.data.train, inputs.data.recent]
    _seed_all(inputs.config.seed)
    model = inputs.build_model(splits)
    checkpoints = Checkpoints(directory, every_steps=inputs.config.train.checkpoint_steps)
    state = checkpoints.restore(model)
    inputs.begin(model, state, splits)
    logger.info("refit on training and validation labels: %d epochs", epochs)
    if state.epoch < epochs:
        with named_corruption(inputs.data, *splits):
            _run(model, inputs, splits, epochs, checkpoints, [checkpoints])
    return inputs.served(model, checkpoints)


def _run(
    model: TwoTower,
    inputs: _Inputs,
    splits: Sequence[Sequences],
    last: int,
    checkpoints: Checkpoints,
    callbacks: Sequence[tf.keras.callbacks.Callback],
) -> None:
    """Train up to the `last` epoch from where the checkpoints are, which are among `callbacks`."""
    for epochs, skip in _parts(checkpoints.state, last):
        if checkpoints.state.stopped:
            return
        steps = inputs.steps_per_epoch(splits) - skip

        def make(
            context: tf.distribute.InputContext, epochs: range = epochs, skip: int = skip
        ) -> tf.data.Dataset:
            own = inputs.training(splits, epochs, skip, _share(context))
            # Keras counts the steps, so no worker has to ask the others before each of them
            # whether they still have a batch, as it would for a data set that may end.
            return own.apply(tf.data.experimental.assert_cardinality(_ENDLESS))

        model.fit(
            batches(model, make),
            initial_epoch=epochs.start,
            epochs=epochs.stop,
            steps_per_epoch=steps,
            verbose=0,
            callbacks=[Progress(steps), *callbacks],
        )


def _parts(state: FitState, last: int) -> list[tuple[range, int]]:
    """Epochs to do and batches to skip: Keras asks for epochs of equal length."""
    if not state.step:
        return [(range(state.epoch, last), 0)]
    begun = (range(state.epoch, state.epoch + 1), state.step)
    return [begun, (range(state.epoch + 1, last), 0)] if state.epoch + 1 < last else [begun]


def _share(context: tf.distribute.InputContext) -> Share:
    own = context.num_replicas_in_sync // context.num_input_pipelines
    first = own * context.input_pipeline_id
    return Share(range(first, first + own), context.num_replicas_in_sync)


def _check_schema(config: RunConfig, data: PreparedData) -> None:
    if config.schema_.fingerprint != data.fingerprint:
        raise ArtifactError(
            f"{data.directory} was prepared for other features than the config's: run "
            "`recsys prepare` again, in a new run folder"
        )


def _save_towers(model: TwoTower, directory: Path) -> None:
    if is_chief():
        with replaced(directory) as folder:
            model.towers.save(folder)


def _manifest(
    inputs: _Inputs, state: FitState, directory: Path, mlflow_run_id: str | None
) -> TrainedModel:
    config, start = inputs.config, inputs.start
    data = inputs.data
    learned = [data.train.last_at, data.judged_until, start.model.learned_until if start else None]
    packages = ("clickstream-recommender", "tensorflow", "tf-keras", "tensorflow-recommenders")
    return TrainedModel(
        directory=directory,
        towers="towers",
        features=config.schema_,
        embedding_dim=config.model.embedding_dim,
        best_epoch=state.best_epoch,
        monitor=config.train.monitor,
        curves=state.curves,
        mlflow_run_id=mlflow_run_id,
        versions={name: version(name) for name in packages},
        before_refit=_BEFORE_REFIT if config.train.refit else None,
        model=config.model,
        started_from=start.source if start else None,
        learned_until=max((moment for moment in learned if moment is not None), default=None),
    )
