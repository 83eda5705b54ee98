"""Keras callbacks of a fit: validate, keep the best epoch, resume, log, show progress.

Every worker runs the same callbacks, since reading a variable may take all of them; the chief alone
writes to the shared folder.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import tensorflow as tf
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from recsys.artifacts import ArtifactError
from recsys.atomic import write_atomically
from training.chief import from_chief, is_chief, wait_for_chief, wait_for_steps
from training.progress import advance

logger = logging.getLogger(__name__)

#: Values of each metric by epoch, the first epoch first.
Curves = Mapping[str, Sequence[float]]
LogCurves = Callable[[Curves], None]
_STATE = "state.json"
_UNREADABLE = (tf.errors.OpError, OSError, ValueError)


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
        # What steps return is not read, so Keras need not wait for it; with parameter servers it
        # refuses to.
        self._supports_tf_logs = True
        self._directory = directory
        self._monitor = monitor
        self._patience = patience
        self._every_steps = every_steps
        self._steps_done = 0
        self.state = FitState()

    def restore(self, model: tf.keras.Model) -> FitState:
        """Load the newest checkpoint into the model and its optimizer, if there is one.

        The chief chooses for all workers: replicas that start apart stay apart.

        Raises:
            ArtifactError: there are checkpoints, but the chief can read none.
            OSError: this worker cannot read what the chief has read.
        """
        if is_chief():
            self._load_newest(model)
        told = from_chief({"epoch": self.state.epoch, "step": self.state.step})
        chosen = FitState(epoch=int(told["epoch"]), step=int(told["step"]))
        if chosen.folder != self.state.folder:
            folder = self._directory / chosen.folder
            try:
                self._load(model, folder)
            except _UNREADABLE as error:
                raise OSError(f"the chief reads {folder}, this worker cannot: {error}") from error
        return self.state

    def _load_newest(self, model: tf.keras.Model) -> None:
        folders = sorted((f.parent for f in self._directory.glob(f"*/{_STATE}")), reverse=True)
        for folder in folders:
            try:
                self._load(model, folder)
            except _UNREADABLE as error:
                logger.warning("%s cannot be read, the one before is used: %s", folder, error)
            else:
                logger.info("resume after epoch %d, step %d", self.state.epoch, self.state.step)
                return
        if folders:
            raise ArtifactError(
                f"none of the {len(folders)} checkpoints in {self._directory} can be read: remove "
                "the folder to train from the beginning"
            )

    def _load(self, model: tf.keras.Model, folder: Path) -> None:
        state = FitState.model_validate_json((folder / _STATE).read_bytes())
        status = self._checkpoint(model).read(str(folder / "weights"))
        status.assert_existing_objects_matched()
        self.state = state

    def restore_best(self, model: tf.keras.Model) -> FitState:
        """Load the weights of the best epoch, also into a model that is not trained."""
        best = self._directory / _epoch_folder(self.state.best_epoch)
        status = tf.train.Checkpoint(model=model).read(str(best / "weights"))
        status.assert_existing_objects_matched().expect_partial()
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
        wait_for_steps()
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
            # A damaged one of this name must not look finished while it is replaced.
            (folder / _STATE).unlink(missing_ok=True)
            with _removed_on_error(folder):
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


def newest_checkpoint(directory: Path) -> str:
    """Name of the newest checkpoint under a folder, greater than those of older ones.

    Empty without one, or while the storage fails.

    Checkpoints of a refit, in a folder of their own in there, are newer than all others.
    """
    with suppress(OSError):
        found = directory.rglob(f"epoch-*/{_STATE}")
        return max((str(file.parent.relative_to(directory)) for file in found), default="")
    return ""


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """Make an empty folder, and remove it when what fills it fails: the disk may be full."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


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
    """Hand the metrics of finished epochs to the log and to the experiment tracker, by the chief.

    It comes after the checkpoints, whose curves it hands out as a whole: what a killed process, or
    a tracker that was away, has left out of them is made up for by the next call.

    Args:
        checkpoints: hold the curves.
        log_curves: gets all epochs so far, also those that it has had.
    """

    def __init__(self, checkpoints: Checkpoints, log_curves: LogCurves) -> None:
        super().__init__()
        self._checkpoints = checkpoints
        self._log_curves = log_curves

    def catch_up(self) -> None:
        """Hand out what there is, after a restart."""
        if is_chief() and self._checkpoints.state.curves:
            self._log_curves(self._checkpoints.state.curves)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Log under the number of the epoch, counted from 1."""
        if is_chief():
            text = ", ".join(f"{name} {value:.4f}" for name, value in (logs or {}).items())
            logger.info("epoch %d: %s", epoch + 1, text)
        self.catch_up()


class Progress(tf.keras.callbacks.Callback):
    """Word of each step to who watches for a hang, and a progress bar to a person who watches."""

    def __init__(self, steps_per_epoch: int) -> None:
        super().__init__()
        self._supports_tf_logs = True
        self._steps = steps_per_epoch

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Open the bar of this epoch."""
        self._bar = tqdm(
            total=self._steps, desc=f"epoch {epoch + 1}", unit="step", leave=False, disable=None
        )

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Advance by one step."""
        advance()
        self._bar.update()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Close the bar, so that the epoch's log line starts on a clean line."""
        self._bar.close()
