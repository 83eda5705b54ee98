import json
import signal
import subprocess
import sys

import optuna
import pytest
from optuna.trial import TrialState

from recsys.search_space import Distribution, Tune
from training.study import Study, TuningError

TUNE = Tune(
    startup_trials=2,
    space={
        "train.learning_rate": Distribution(low=1e-4, high=0.1, log=True),
        "model.embedding_dim": Distribution(low=8, high=64),
        "model.hidden": Distribution(choices=([], [16])),
    },
)
DEFAULT = {"train.learning_rate": 0.5, "model.embedding_dim": 64, "model.hidden": [32]}
DIE = """
import sys, os, signal
from recsys.search_space import Tune
from training.study import Study
tune, default = Tune.model_validate_json(sys.argv[2]), __import__("json").loads(sys.argv[3])
with Study.open(__import__("pathlib").Path(sys.argv[1]), tune, default, 1) as study:
    trial = study.ask(study.missing(9)[0])
    trial.report(0.25, 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def opened(folder, tune=TUNE):
    return Study.open(folder, tune, DEFAULT, 1)


def finish(study, number, value=None):
    trial = study.ask(number)
    values = study.values(trial)
    # A value that depends on what was drawn, so that the sampler has something to learn.
    score = 1 / (1 + values.get("model.embedding_dim", 64)) if value is None else value
    study.tell(trial, TrialState.COMPLETE, score)
    return values


def die(folder):
    command = [sys.executable, "-c", DIE, str(folder), TUNE.model_dump_json(), json.dumps(DEFAULT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_the_first_trial_is_the_config_as_it_is_even_outside_the_space(tmp_path):
    with opened(tmp_path) as study:
        assert study.missing(3) == [0, 1, 2]
        assert finish(study, 0) == {}
        # The sampler must not learn from values that it cannot draw.
        assert study.trials[0].params == {"model.embedding_dim": 64}
        values = finish(study, 1)
    assert 1e-4 <= values["train.learning_rate"] <= 0.1
    assert float(f"{values['train.learning_rate']:.4g}") == values["train.learning_rate"]
    assert isinstance(values["model.embedding_dim"], int)
    assert values["model.hidden"] in ([], [16])


def test_what_is_drawn_does_not_depend_on_restarts(tmp_path):
    with opened(tmp_path / "one") as study:
        drawn = [finish(study, number) for number in range(6)]
    again = []
    for number in range(6):
        with opened(tmp_path / "many") as study:
            assert study.missing(6)[0] == number
            again.append(finish(study, number))
    assert again == drawn
    assert len({json.dumps(values) for values in drawn}) == 6


def test_a_killed_trial_is_tried_again_with_its_values_and_what_it_reported(tmp_path):
    with opened(tmp_path / "undisturbed") as study:
        drawn = [finish(study, number) for number in range(3)]
    with opened(tmp_path / "killed") as study:
        finish(study, 0)
    die(tmp_path / "killed")
    with opened(tmp_path / "killed") as study:
        assert study.missing(3) == [1, 2]
        trial = study.ask(1)
        assert study.values(trial) == drawn[1]
        assert study.reported(trial) == {1: 0.25}
        study.tell(trial, TrialState.COMPLETE, 0.5)
        assert finish(study, 2, 0.1) is not None
        assert study.missing(3) == []
        assert [t.state for t in study.trials.values()] == [TrialState.COMPLETE] * 3


def test_values_that_kill_the_process_again_and_again_are_given_up(tmp_path, caplog):
    with opened(tmp_path) as study:
        finish(study, 0)
    for _ in range(3):
        die(tmp_path)
    with opened(tmp_path) as study:
        assert study.missing(3) == [2]
        assert study.trials[1].state == TrialState.FAIL
    assert "trial 1 was killed 3 times: it is given up" in caplog.text


def test_a_trial_below_the_median_is_pruned_from_the_second_epoch_on(tmp_path):
    with opened(tmp_path) as study:
        for number in range(2):
            trial = study.ask(number)
            for epoch in (1, 2, 3):
                trial.report(0.5, epoch)
            study.tell(trial, TrialState.COMPLETE, 0.5)
        trial = study.ask(2)
        pruned = []
        for epoch in (1, 2):
            trial.report(0.1, epoch)
            pruned.append(trial.should_prune())
        study.tell(trial, TrialState.PRUNED)
        assert study.best == 0
    assert pruned == [False, True]


def test_only_one_process_at_a_time(tmp_path):
    with opened(tmp_path), pytest.raises(TuningError, match="another process tunes in"):
        with opened(tmp_path):
            pass


def test_a_study_does_not_change_its_space(tmp_path):
    with opened(tmp_path):
        pass
    space = TUNE.space | {"model.hidden": Distribution(choices=([], [32]))}
    with pytest.raises(
        TuningError,
        match=r"another space: model\.hidden changed in tune\.space\. Put it back, or remove",
    ):
        with opened(tmp_path, Tune(space=space)):
            pass


def test_the_file_is_optunas(tmp_path):
    with opened(tmp_path) as study:
        finish(study, 0)
        name = study.name
    found = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert found.best_value == 1 / 65
