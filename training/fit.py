"""Train the two towers from prepared data, under whatever strategy is in scope."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tensorflow as tf

from recsys.artifacts import ArtifactError, PreparedData, TrainedModel, replaced
from recsys.config import RunConfig
from recsys.dataset import (
    named_corruption,
    raw_batches,
    read_corpus,
    read_interactions,
    training_batches,
)
from recsys.features import FeatureEncoder
from recsys.metrics import per_query
from recsys.models.retrieval import TwoTower
from recsys.ranks import DotProduct, rank_queries
from training.callbacks import EpochCheckpoints, EpochLog, FitState, Progress, Validation

logger = logging.getLogger(__name__)

_VALIDATION_BATCH = 4096
LogMetrics = Callable[[dict[str, float], int], None]


def fit(
    config: RunConfig,
    data: PreparedData,
    directory: Path,
    mlflow_run_id: str | None = None,
    log_metrics: LogMetrics = lambda metrics, step: None,
) -> TrainedModel:
    """Train to the best validation epoch and save the towers; resume where a killed one stopped.

    Args:
        config: the run.
        data: what `prepare` made; its schema must be that of the config.
        directory: receives `checkpoints/`, `towers/` and the manifest.
        mlflow_run_id: noted in the manifest.
        log_metrics: called after each epoch with its metrics and its number.

    Raises:
        ArtifactError: the data were prepared for other features, or a shard is corrupt.
    """
    _check_schema(config, data)
    # The same seed must give the same model, also after a restart in the middle.
    tf.keras.utils.set_random_seed(config.seed)
    tf.config.experimental.enable_op_determinism()
    inputs = _Inputs(config, data)
    model = inputs.build_model()
    checkpoints = EpochCheckpoints(
        directory / "checkpoints", config.train.monitor, config.train.patience
    )
    state = checkpoints.restore(model)
    if not state.stopped and state.epoch < config.train.epochs:
        with named_corruption(data, data.train):
            _train(model, inputs, checkpoints, log_metrics)
    state = checkpoints.restore_best(model)
    best = state.best(config.train.monitor)
    logger.info("best epoch %d: %s %.4f", state.best_epoch, config.train.monitor, best)
    _save_towers(model, directory / "towers")
    return _manifest(config, state, directory, mlflow_run_id).save()


class _Inputs:
    """What the model reads: encoded batches, and the validation queries."""

    def __init__(self, config: RunConfig, data: PreparedData) -> None:
        self.config = config
        self.data = data
        self.encoder = FeatureEncoder(data)
        self.corpus = read_corpus(data)
        self._rows = self.corpus.rows()
        self._validation = read_interactions(data, data.validation, self.corpus)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the training examples."""
        return math.ceil(self.data.train.num_examples / self.config.train.global_batch_size)

    def training(self, epochs: range) -> tf.data.Dataset:
        """Encoded batches with `row` and `weight`, for these epochs."""
        train = self.config.train
        raw = training_batches(
            self.data, train.global_batch_size, epochs, self.config.seed, train.shuffle_buffer
        )
        return raw.map(self._encode, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    def build_model(self) -> TwoTower:
        """Build and compile the model and create all its variables."""
        config = self.config
        model = TwoTower(config.model, config.schema_, self.encoder, self.corpus, seed=config.seed)
        optimizers = {"adam": tf.keras.optimizers.Adam, "adagrad": tf.keras.optimizers.Adagrad}
        model.compile(optimizer=optimizers[config.train.optimizer](config.train.learning_rate))
        for raw in raw_batches(self.data, self.data.validation, 1).take(1):
            model(self.encoder(raw))
        model.embed_corpus()
        model.optimizer.build(model.trainable_variables)
        return model

    def validate(self, model: TwoTower) -> dict[str, float]:
        """Metrics of the validation examples over the whole corpus, exactly."""
        raw = raw_batches(self.data, self.data.validation, _VALIDATION_BATCH)
        queries = np.concatenate([model.embed_queries(self.encoder(batch)) for batch in raw])
        ranking = rank_queries(
            "validation",
            DotProduct(queries, model.embed_corpus().numpy()),
            self._validation,
            len(self.corpus),
            k=1,
            seed=self.config.seed,
        )
        k = int(self.config.train.monitor.split("@")[1])
        return {name: float(values.mean()) for name, values in per_query(ranking.rank, [k]).items()}

    def _encode(self, raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        row = self._rows.lookup(raw.pop("label"))
        return self.encoder(raw) | {"row": row}


def _train(
    model: TwoTower, inputs: _Inputs, checkpoints: EpochCheckpoints, log_metrics: LogMetrics
) -> None:
    epochs = range(checkpoints.state.epoch, inputs.config.train.epochs)
    model.fit(
        inputs.training(epochs),
        initial_epoch=epochs.start,
        epochs=epochs.stop,
        steps_per_epoch=inputs.steps_per_epoch,
        verbose=0,
        callbacks=[
            Progress(inputs.steps_per_epoch),
            Validation(lambda: inputs.validate(model)),
            EpochLog(log_metrics),
            checkpoints,
        ],
    )


def _check_schema(config: RunConfig, data: PreparedData) -> None:
    if config.schema_.fingerprint != data.fingerprint:
        raise ArtifactError(
            f"{data.directory} was prepared for other features than the config's: run "
            "`recsys prepare` again, in a new run folder"
        )


def _save_towers(model: TwoTower, directory: Path) -> None:
    with replaced(directory) as folder:
        model.towers.save(folder)


def _manifest(
    config: RunConfig, state: FitState, directory: Path, mlflow_run_id: str | None
) -> TrainedModel:
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
    )
