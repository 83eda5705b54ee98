"""Keras callbacks of a fit: validate, keep the best epoch, resume, log, show progress.

Every worker runs the same callbacks, since reading a variable may take all of them; the chief alone
writes to the shared folder.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tensorflow as tf
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from recsys.artifacts import ArtifactError, write_atomically
from training.chief import from_chief, is_chief, wait_for_chief

logger = logging.getLogger(__name__)

_STATE = "state.json"


class FitState(BaseModel):
    """How far a training has come: finished epochs, and steps of the one that has begun."""

    # A loss that is not a number must not make the state unreadable.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    stopped: bool = False
    curves: dict[str, list[float]] = {}

    def best(self, monitor: str) -> float:
        """Value of the monitored metric at the best epoch, below any metric before the first."""
        return self.curves[monitor][self.best_epoch - 1] if self.best_epoch else -1.0

    @property
    def folder(self) -> str:
        """Name of the folder of its checkpoint; later states have greater names."""
        return _epoch_folder(self.epoch) + (f"-step-{self.step:08d}" if self.step else "")


class Checkpoints(tf.keras.callbacks.Callback):
    """Save each finished epoch, remember the best, stop when `patience` epochs brought no better.

    Without a metric to monitor the last epoch is the best, and nothing stops.

    Each checkpoint has its own folder, whose `state.json` is written last: a process that is killed
    anywhere resumes at the last finished one. The one before is kept, in case the last is damaged.

    Args:
        directory: shared by all workers.
        monitor: metric of the epoch's logs that is best when highest.
        patience: epochs.
        every_steps: save so often within an epoch too.
    """

    def __init__(
        self,
        directory: Path,
        monitor: str | None = None,
        patience: int = 1,
        every_steps: int | None = None,
    ) -> None:
        super().__init__()
        self._directory = directory
        self._monitor = monitor
        self._patience = patience
        self._every_steps = every_steps
        self._steps_done = 0
        self.state = FitState()

    def restore(self, model: tf.keras.Model) -> FitState:
        """Load the newest checkpoint into the model and its optimizer, if there is one.

        Raises:
            ArtifactError: there are checkpoints, but none can be read.
        """
        folders = sorted((f.parent for f in self._directory.glob(f"*/{_STATE}")), reverse=True)
        for folder in folders:
            try:
                self._load(model, folder)
            except (tf.errors.OpError, OSError, ValueError) as error:
                logger.warning("%s cannot be read, the one before is used: %s", folder, error)
            else:
                logger.info("resume after epoch %d, step %d", self.state.epoch, self.state.step)
                return self.state
        if folders:
            raise ArtifactError(
                f"none of the {len(folders)} checkpoints in {self._directory} can be read: remove "
                "the folder to train from the beginning"
            )
        return self.state

    def _load(self, model: tf.keras.Model, folder: Path) -> None:
        state = FitState.model_validate_json((folder / _STATE).read_bytes())
        status = self._checkpoint(model).read(str(folder / "weights"))
        status.assert_existing_objects_matched()
        self.state = state

    def restore_best(self, model: tf.keras.Model) -> FitState:
        """Load the weights of the best epoch."""
        best = self._directory / _epoch_folder(self.state.best_epoch)
        self._checkpoint(model).read(str(best / "weights")).expect_partial()
        return self.state

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Count from where the epoch is resumed."""
        self._steps_done = self.state.step
        if self.state.step:
            # Keras has just reset the mean loss of the steps that were done before.
            self._load(self.model, self._directory / self.state.folder)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Save within the epoch, unless its end is here."""
        self._steps_done += 1
        due = self._every_steps and self._steps_done % self._every_steps == 0
        if due and batch + 1 < self.params["steps"]:
            self._save(self.state.model_copy(update={"step": self._steps_done}))

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Save, and stop if there is nothing better to come."""
        number = epoch + 1
        metrics = dict(logs or {})
        better = self._monitor is None or metrics[self._monitor] > self.state.best(self._monitor)
        best_epoch = number if better else self.state.best_epoch
        curves = {
            name: [*self.state.curves.get(name, []), float(value)]
            for name, value in metrics.items()
        }
        stopped = number - best_epoch >= self._patience
        self._save(FitState(epoch=number, best_epoch=best_epoch, stopped=stopped, curves=curves))
        self.model.stop_training = stopped

    def _save(self, state: FitState) -> None:
        """Write the checkpoint, then the state that makes it one, then forget older ones."""
        with self._own_folder(state) as folder:
            self._checkpoint(self.model).write(str(folder / "weights"))
            write_atomically(folder / _STATE, state.model_dump_json(indent=2))
        if is_chief():
            # If the new one is damaged, the state before it needs its own best.
            states = (state, self.state)
            self._forget({s.folder for s in states} | {_epoch_folder(s.best_epoch) for s in states})
        self.state = state
        wait_for_chief()

    @contextmanager
    def _own_folder(self, state: FitState) -> Iterator[Path]:
        if is_chief():
            folder = self._directory / state.folder
            folder.mkdir(parents=True, exist_ok=True)
            # A damaged one of this name must not look finished while it is replaced.
            (folder / _STATE).unlink(missing_ok=True)
            yield folder
        else:
            with tempfile.TemporaryDirectory() as unshared:
                yield Path(unshared)

    def _checkpoint(self, model: tf.keras.Model) -> tf.train.Checkpoint:
        return tf.train.Checkpoint(model=model, optimizer=model.optimizer)

    def _forget(self, kept: set[str]) -> None:
        # Newer ones are not its own: a chief that was frozen may wake up beside its successor.
        newest = max(kept)
        for folder in self._directory.glob("epoch-*"):
            if folder.name not in kept and folder.name < newest:
                shutil.rmtree(folder)


def _epoch_folder(epoch: int) -> str:
    return f"epoch-{epoch:04d}"


class Validation(tf.keras.callbacks.Callback):
    """Add the validation metrics of the whole corpus to the logs of an epoch."""

    def __init__(self, measure: Callable[[], dict[str, float]]) -> None:
        super().__init__()
        self._measure = measure

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Measure; callbacks that come later see the result, the same on all workers."""
        if logs is not None:
            # Machines may round differently, and must not disagree on which epoch is the best.
            logs.update(from_chief(self._measure()))


class EpochLog(tf.keras.callbacks.Callback):
    """Hand each epoch's metrics to the log and to the experiment tracker, by the chief."""

    def __init__(self, log_metrics: Callable[[dict[str, float], int], None]) -> None:
        super().__init__()
        self._log_metrics = log_metrics

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Log under the number of the epoch, counted from 1."""
        if not is_chief():
            return
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
