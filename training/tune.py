"""Search for better settings: each trial is one fit, compared on the validation split alone."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import tensorflow as tf
from optuna.trial import FrozenTrial, TrialState

from recsys.artifacts import MANIFEST, ArtifactError, PreparedData
from recsys.config import RunConfig
from recsys.overrides import as_overrides, check_tunable, value_of, with_values
from recsys.tuning_report import TrialReport, TuningReport
from training.callbacks import Curves
from training.fit import fit
from training.study import Study, TuningError

if TYPE_CHECKING:
    from training.tracking import Tracker

logger = logging.getLogger(__name__)

_STATES: dict[TrialState, Any] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


def tune(
    config: RunConfig,
    data: PreparedData,
    directory: Path,
    tracker: Tracker,
    trials: int | None = None,
) -> TuningReport:
    """Go on with the study of this folder until it has enough trials, and report the best.

    A trial is valued by `train.monitor` at its best epoch, on the validation split; the test split
    is not read. Trial 0 is the config as it is, so the best is never worse than that.

    Args:
        config: the run; `tune.space` says what varies.
        data: what `prepare` made.
        directory: receives `study.db`, the model of the best trial and the manifest.
        tracker: the MLflow run that the trials' runs are nested in.
        trials: how many there shall be in all; `tune.trials` when not given.

    Raises:
        ConfigError: `tune.space` is empty, or has a key or value that the config refuses.
        ArtifactError: the data do not fit the config, or a shard is corrupt.
        TuningError: see `Study.open`.
    """
    check_tunable(config)
    if config.cluster.kind != "local":
        logger.warning("trials train in this process, not by cluster.kind=%s", config.cluster.kind)
    (directory / MANIFEST).unlink(missing_ok=True)
    default = {key: value_of(config, key) for key in config.tune.space}
    with Study.open(directory, config.tune, default, config.seed) as study:
        _Search(config, data, directory, tracker, study).run(trials or config.tune.trials)
        return _report(study, config.train.monitor, directory).save()


class _Search:
    """The trials of one start of `tune`."""

    def __init__(
        self, config: RunConfig, data: PreparedData, directory: Path, tracker: Tracker, study: Study
    ) -> None:
        self._config = config
        self._data = data
        self._directory = directory
        self._tracker = tracker
        self._study = study

    def run(self, total: int) -> None:
        """Do the trials that are missing, until the time is over."""
        started = time.monotonic()
        minutes = self._config.tune.timeout_minutes
        for number in self._study.missing(total):
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                logger.info("tune.timeout_minutes=%g are over: no further trial", minutes)
                return
            self._attempt(number)
            _keep_only(self._directory, self._study.best)
            # What Keras keeps of a model that is gone would add up over the trials.
            tf.keras.backend.clear_session()

    def _attempt(self, number: int) -> None:
        """Do one trial; its MLflow run is closed first, as a killed trial is opened again."""
        if number not in self._study.trials:
            # Of an earlier study, whose file is gone.
            shutil.rmtree(self._directory / _folder(number), ignore_errors=True)
        trial = self._study.ask(number)
        values = self._study.values(trial)
        logger.info("trial %d: %s", number, " ".join(as_overrides(values)) or "config as it is")
        child = self._tracker.child(_folder(number), f"{self._study.name}/{number}")
        try:
            value = self._fit(trial, values, _folder(number), child)
        except optuna.TrialPruned:
            logger.info("trial %d: pruned", number)
            child.set_status("KILLED")
            self._study.tell(trial, TrialState.PRUNED)
        except BaseException as error:
            child.set_status("FAILED")
            if number == 0 or not _is_of_the_trial(error):
                raise
            logger.warning("trial %d failed: %s: %s", number, type(error).__name__, error)
            self._study.tell(trial, TrialState.FAIL)
        else:
            child.set_status("FINISHED")
            self._study.tell(trial, TrialState.COMPLETE, value)
            logger.info("trial %d: %s %.4f", number, self._config.train.monitor, value)

    def _fit(
        self, trial: optuna.Trial, values: dict[str, Any], folder: str, child: Tracker
    ) -> float:
        """Value of the best epoch."""
        # A refit does not change what a trial is valued by.
        config = with_values(self._config, values | {"train.refit": False})
        monitor = config.train.monitor
        child.log_params({key: str(value) for key, value in values.items()})
        reported = set(self._study.reported(trial))

        def log_curves(curves: Curves) -> None:
            child.follow_curves(curves)
            for epoch, value in enumerate(curves[monitor], 1):
                if epoch not in reported:
                    trial.report(value, epoch)
                    reported.add(epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        model = fit(config, self._data, self._directory / folder, child.run_id, log_curves)
        child.log_curves(model.curves)
        value = model.curves[monitor][model.best_epoch - 1]
        child.log_metrics({f"best/{monitor}": value})
        return value


def _is_of_the_trial(error: BaseException) -> bool:
    """Whether other values may do better: out of memory, say, but not a corrupt shard."""
    return isinstance(error, Exception) and not isinstance(error, ArtifactError)


def _folder(number: int) -> str:
    return f"trial-{number:04d}"


def _keep_only(directory: Path, best: int | None) -> None:
    """Remove what other trials left: a long study must not fill the disk."""
    for folder in directory.glob("trial-*"):
        if best is None or folder.name != _folder(best):
            shutil.rmtree(folder)


def _report(study: Study, monitor: str, directory: Path) -> TuningReport:
    best = study.best
    if best is None:
        raise TuningError(f"no trial of {directory} has come to its end: give it more time")
    done = [_trial_report(study, n, t) for n, t in study.trials.items() if t.state in _STATES]
    done.sort(key=lambda trial: (-(trial.value or 0.0), trial.number))
    chosen = next(trial for trial in done if trial.number == best)
    return TuningReport(
        directory=directory,
        study=study.name,
        monitor=monitor,
        best_trial=best,
        best_value=chosen.value or 0.0,
        best_overrides=chosen.overrides,
        best_model=_folder(best),
        trials=done,
    )


def _trial_report(study: Study, number: int, trial: FrozenTrial) -> TrialReport:
    reported = trial.intermediate_values
    value = max(reported.values(), default=None) if trial.state != TrialState.FAIL else None
    return TrialReport(
        number=number,
        state=_STATES[trial.state],
        value=trial.value if trial.state == TrialState.COMPLETE else value,
        epochs=len(reported),
        overrides=as_overrides(study.values(trial)),
    )
