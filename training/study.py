"""An Optuna study in a folder: numbered trials, and one whose process died is tried again."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from recsys.search_space import Distribution, Tune

logger = logging.getLogger(__name__)

STUDY = "study.db"
_NUMBER, _SPACE = "number", "space"
_ATTEMPTS = 3
_DIGITS = 4
# After one epoch a trial with a low learning rate looks worse than it will be.
_FIRST_PRUNING = 2
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class TuningError(RuntimeError):
    """The study cannot go on; the message says why and what to do."""


class Study:
    """Trials numbered from 0; number 0 is the config as it is.

    A trial whose process was killed is attempted again with the same values, so Optuna's own
    numbers, which count attempts, can be higher. The last attempt at a number counts. What is drawn
    for a number depends on the seed, the number and the earlier results, so a study that was
    interrupted goes on as an undisturbed one.
    """

    def __init__(
        self, study: optuna.Study, tune: Tune, default: Mapping[str, Any], seed: int
    ) -> None:
        self.name = study.study_name
        self._study = study
        self._study.pruner = _pruner(tune.startup_trials)
        self._tune = tune
        self._default = default
        self._seed = seed

    @classmethod
    @contextmanager
    def open(
        cls, directory: Path, tune: Tune, default: Mapping[str, Any], seed: int
    ) -> Iterator[Study]:
        """Begin the study of this folder, or go on with it; no other process can meanwhile.

        Args:
            directory: receives `study.db`, for any of Optuna's tools to read.
            tune: the space, and when to begin to learn from trials.
            default: the config's own value of each key of the space.
            seed: of all draws.

        Raises:
            TuningError: another process works on the study, or it searched another space.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directory.mkdir(parents=True, exist_ok=True)
        with _alone(directory):
            found = _load_or_create(directory / STUDY)
            _check_same_space(found, tune, directory)
            study = cls(found, tune, default, seed)
            study._retire()
            yield study

    @property
    def trials(self) -> dict[int, FrozenTrial]:
        """The last attempt at each number, by number."""
        attempts = self._study.get_trials(deepcopy=False)
        latest = {trial.user_attrs[_NUMBER]: trial for trial in attempts}
        return dict(sorted(latest.items()))

    @property
    def best(self) -> int | None:
        """Number of the best trial that came to its end; the first of several that are equal."""
        done = [(t.value, -n) for n, t in self.trials.items() if t.state == TrialState.COMPLETE]
        return -max((value or 0.0, number) for value, number in done)[1] if done else None

    def missing(self, total: int) -> list[int]:
        """Numbers below `total` that have not been finished."""
        finished = {n for n, trial in self.trials.items() if trial.state in _FINISHED}
        return [number for number in range(total) if number not in finished]

    def ask(self, number: int) -> optuna.Trial:
        """Begin a trial, or attempt it again: its values are drawn and stored."""
        present = {name: d for name, d in self._tune.space.items() if self._drawn(number, name)}
        if number not in self.trials:
            own = present if number == 0 else {}
            fixed = {name: _encode(d, self._default[name]) for name, d in own.items()}
            self._study.enqueue_trial(fixed, user_attrs={_NUMBER: number})
        # Of their own for each number: else every start would draw the same again.
        self._study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=self._tune.startup_trials, seed=_seed(self._seed, number)
        )
        return self._study.ask({name: _optuna(d) for name, d in present.items()})

    def values(self, trial: optuna.Trial | FrozenTrial) -> dict[str, Any]:
        """What a trial sets, by dotted key; nothing for the config as it is."""
        if trial.user_attrs[_NUMBER] == 0:
            return {}
        space = self._tune.space
        return {name: _decode(space[name], drawn) for name, drawn in trial.params.items()}

    def reported(self, trial: optuna.Trial) -> dict[int, float]:
        """Values of the epochs that earlier attempts at this trial have reported."""
        return self._study.get_trials(deepcopy=False)[trial.number].intermediate_values

    def tell(self, trial: optuna.Trial, state: TrialState, value: float | None = None) -> None:
        """Finish a trial."""
        self._study.tell(trial, value, state)

    def _drawn(self, number: int, name: str) -> bool:
        # The config's own value may lie outside the space; trial 0 has it all the same.
        return number > 0 or self._tune.space[name].holds(self._default[name])

    def _retire(self) -> None:
        """Fail what a killed process left running, and put it in line again."""
        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            # Before the old one is failed: a kill in between must not lose the number.
            if self.trials[trial.user_attrs[_NUMBER]].number == trial.number:
                self._try_again(trial)
            self._study.tell(trial.number, state=TrialState.FAIL)

    def _try_again(self, trial: FrozenTrial) -> None:
        number = trial.user_attrs[_NUMBER]
        attempts = sum(t.user_attrs[_NUMBER] == number for t in self._study.get_trials())
        # Its values may be what kills the process, such as a model larger than the memory.
        if number > 0 and attempts >= _ATTEMPTS:
            logger.warning("trial %d was killed %d times: it is given up", number, attempts)
            return
        logger.info("trial %d was killed: it is tried again", number)
        self._study.add_trial(_again(trial))


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    # The system drops the lock with the process, however that ends: what is found running is dead.
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TuningError(
                f"another process tunes in {directory}: wait for it, or end it"
            ) from error
        yield


def _load_or_create(file: Path) -> optuna.Study:
    storage = optuna.storages.RDBStorage(f"sqlite:///{file.resolve()}")
    names = optuna.get_all_study_names(storage)
    if names:
        return optuna.load_study(study_name=names[0], storage=storage)
    # A name of its own: MLflow may still hold the trials of an earlier study in this folder.
    return optuna.create_study(
        storage=storage, study_name=f"tuning-{uuid4().hex[:12]}", direction="maximize"
    )


def _check_same_space(study: optuna.Study, tune: Tune, directory: Path) -> None:
    space = {name: d.model_dump(mode="json") for name, d in tune.space.items()}
    before = study.user_attrs.get(_SPACE)
    if before is None:
        study.set_user_attr(_SPACE, space)
    elif before != space:
        changed = [k for k in before | space if before.get(k) != space.get(k)]
        raise TuningError(
            f"{directory / STUDY} searched another space: {', '.join(sorted(changed))} "
            f"changed in tune.space. Put it back, or remove {directory} to begin anew"
        )


def _pruner(startup_trials: int) -> optuna.pruners.BasePruner:
    """Stop a trial whose best epoch is below the median of the others at the same epoch.

    Hyperband would split the few dozen trials that a study has into brackets, each of which the
    sampler learns alone; the median needs no settings.
    """
    return optuna.pruners.MedianPruner(
        startup_trials, n_warmup_steps=_FIRST_PRUNING, n_min_trials=startup_trials
    )


def _again(trial: FrozenTrial) -> FrozenTrial:
    # The training goes on after its last epoch, so the pruner needs what earlier epochs reported.
    return create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        system_attrs=trial.system_attrs,
        intermediate_values=trial.intermediate_values,
    )


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _optuna(distribution: Distribution) -> BaseDistribution:
    low, high, log = distribution.low, distribution.high, distribution.log
    if low is None or high is None:
        return CategoricalDistribution([json.dumps(choice) for choice in distribution.choices])
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log)
    return FloatDistribution(low, high, log)


def _encode(distribution: Distribution, value: Any) -> Any:
    # Optuna stores numbers and text, but a choice may also be a list.
    choices = distribution.choices
    return json.dumps(choices[choices.index(value)]) if choices else value


def _decode(distribution: Distribution, drawn: Any) -> Any:
    if distribution.choices:
        return json.loads(drawn)
    if distribution.low is None or distribution.high is None or isinstance(drawn, int):
        return drawn
    # Nobody needs more digits, and the override stays readable.
    rounded = float(f"{drawn:.{_DIGITS}g}")
    return min(max(rounded, distribution.low), distribution.high)
