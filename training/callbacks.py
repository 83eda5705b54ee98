"""Keras callbacks of a fit: validate, keep the best epoch, resume, log, show progress."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from recsys.artifacts import write_atomically

logger = logging.getLogger(__name__)

_STATE = "state.json"


class FitState(BaseModel):
    """How far a training has come; written after its checkpoint, so it never points to nothing."""

    # A loss that is not a number must not make the state unreadable.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    epoch: int = 0
    best_epoch: int = 0
    stopped: bool = False
    curves: dict[str, list[float]] = {}

    def best(self, monitor: str) -> float:
        """Value of the monitored metric at the best epoch, below any metric before the first."""
        return self.curves[monitor][self.best_epoch - 1] if self.best_epoch else -1.0


class EpochCheckpoints(tf.keras.callbacks.Callback):
    """Save each finished epoch, remember the best, stop when `patience` epochs brought no better.

    Without a metric to monitor the last epoch is the best, and nothing stops.

    `directory/state.json` is replaced as a whole after the checkpoint of its epoch exists: a
    process that is killed anywhere resumes at the last finished epoch.
    """

    def __init__(self, directory: Path, monitor: str | None = None, patience: int = 1) -> None:
        super().__init__()
        self._directory = directory
        self._monitor = monitor
        self._patience = patience
        self.state = FitState()

    def restore(self, model: tf.keras.Model) -> FitState:
        """Load the last finished epoch into the model and its optimizer, if there is one."""
        file = self._directory / _STATE
        if file.is_file():
            self.state = FitState.model_validate_json(file.read_bytes())
            status = self._checkpoint(model).read(self._path(self.state.epoch))
            status.assert_existing_objects_matched()
            logger.info("resume after epoch %d", self.state.epoch)
        return self.state

    def restore_best(self, model: tf.keras.Model) -> FitState:
        """Load the weights of the best epoch."""
        self._checkpoint(model).read(self._path(self.state.best_epoch)).expect_partial()
        return self.state

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Write the checkpoint, then the state that names it, then forget older epochs."""
        number = epoch + 1
        metrics = dict(logs or {})
        better = self._monitor is None or metrics[self._monitor] > self.state.best(self._monitor)
        best_epoch = number if better else self.state.best_epoch
        curves = {
            name: [*self.state.curves.get(name, []), float(value)]
            for name, value in metrics.items()
        }
        stopped = number - best_epoch >= self._patience
        self.state = FitState(epoch=number, best_epoch=best_epoch, stopped=stopped, curves=curves)
        self._checkpoint(self.model).write(self._path(number))
        write_atomically(self._directory / _STATE, self.state.model_dump_json(indent=2))
        self._forget(keep={number, best_epoch})
        self.model.stop_training = stopped

    def _checkpoint(self, model: tf.keras.Model) -> tf.train.Checkpoint:
        return tf.train.Checkpoint(model=model, optimizer=model.optimizer)

    def _path(self, epoch: int) -> str:
        return str(self._directory / f"epoch-{epoch:04d}" / "weights")

    def _forget(self, keep: set[int]) -> None:
        for folder in self._directory.glob("epoch-*"):
            if int(folder.name.removeprefix("epoch-")) not in keep:
                shutil.rmtree(folder)


class Validation(tf.keras.callbacks.Callback):
    """Add the validation metrics of the whole corpus to the logs of an epoch."""

    def __init__(self, measure: Callable[[], dict[str, float]]) -> None:
        super().__init__()
        self._measure = measure

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Measure; callbacks that come later see the result."""
        if logs is not None:
            logs.update(self._measure())


class EpochLog(tf.keras.callbacks.Callback):
    """Hand each epoch's metrics to the log and to the experiment tracker."""

    def __init__(self, log_metrics: Callable[[dict[str, float], int], None]) -> None:
        super().__init__()
        self._log_metrics = log_metrics

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Log under the number of the epoch, counted from 1."""
        metrics = dict(logs or {})
        text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        logger.info("epoch %d: %s", epoch + 1, text)
        self._log_metrics(metrics, epoch + 1)


class Progress(tf.keras.callbacks.Callback):
    """A progress bar of the steps, when a person watches."""

    def __init__(self, steps_per_epoch: int) -> None:
        super().__init__()
        self._steps = steps_per_epoch

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Open the bar of this epoch."""
        self._bar = tqdm(
            total=self._steps, desc=f"epoch {epoch + 1}", unit="step", leave=False, disable=None
        )

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Advance by one step."""
        self._bar.update()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Close the bar, so that the epoch's log line starts on a clean line."""
        self._bar.close()
