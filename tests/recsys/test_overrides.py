import pytest
from typer.testing import CliRunner

from recsys.cli import app
from recsys.config import ConfigError, load_config
from recsys.overrides import (
    as_overrides,
    check_space,
    check_tunable,
    overridden,
    value_of,
    with_values,
)

VALUES = {
    "model.hidden": [128, 64],
    "model.loss.temperature": 0.035,
    "model.loss.normalize": False,
    "train.optimizer": "adagrad",
    "train.learning_rate": 1e-05,
    "data.cleaning.max_events_per_day": None,
    "data.events.time_format": "yyyy-MM-dd'T'HH:mm, it's odd",
}


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(CliRunner().invoke(app, ["configs", "template"]).stdout)
    return file


@pytest.fixture
def config(config_file):
    return load_config(config_file)


def test_values_are_set_and_written_as_the_command_reads_them(config, config_file):
    changed = with_values(config, VALUES)
    assert changed.model.hidden == (128, 64)
    assert changed.train.optimizer == "adagrad"
    assert load_config(config_file, as_overrides(VALUES)) == changed
    assert {key: value_of(changed, key) for key in VALUES} == VALUES


def test_words_are_written_without_quotes():
    assert as_overrides({"train.optimizer": "adam", "a": "no word"}) == [
        "train.optimizer=adam",
        'a="no word"',
    ]
    assert as_overrides({"a": "null", "b": "true", "c": "off"}) == [
        'a="null"',
        'b="true"',
        'c="off"',
    ]


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (
            "model.embedding_dim",
            r"model\.embedding_dim: the weights of train\.warm_start=champion fit",
        ),
        ("train.warm_start", r"train\.warm_start: all trials begin with the same weights"),
    ],
)
def test_a_warm_start_is_not_tuned_nor_what_it_fixes(config, key, told):
    space = {"train.warm_start": "champion", "tune.space": {key: {"choices": [64, 32]}}}
    with pytest.raises(ConfigError, match=told):
        check_space(with_values(config, space))
    scratch = space | {"train.warm_start": None}
    if key == "model.embedding_dim":
        check_space(with_values(config, scratch))


def test_a_frozen_config_is_a_config_file(config, config_file, tmp_path):
    """`recsys tune` prints a command that reads the config.json of the run."""
    frozen = tmp_path / "config.json"
    frozen.write_text(config.model_dump_json(indent=2))
    assert load_config(frozen) == config


@pytest.mark.parametrize(
    ("key", "distribution", "message"),
    [
        (
            "model.embeding_dim",
            {"low": 8, "high": 64},
            r"model\.embeding_dim: unknown key; did you mean 'embedding_dim'\?",
        ),
        (
            "train.learning_rat",
            {"choices": [0.1]},
            r"tune\.space\.train\.learning_rat, value 0\.1:\n.*did you mean 'learning_rate'\?",
        ),
        (
            "modl.dropout",
            {"low": 0.0, "high": 0.5},
            r"tune\.space\.modl\.dropout: only keys of `model` and `train` .*did you mean 'model\.dropout'\?",
        ),
        (
            "data.shards",
            {"low": 1, "high": 4},
            r"tune\.space\.data\.shards: only keys of `model` and `train` can be tuned",
        ),
        ("model", {"choices": [1]}, r"only keys of `model` and `train`"),
        (
            "train.monitor",
            {"choices": ["ndcg@5"]},
            r"train\.monitor: it is what the trials are compared by",
        ),
        (
            "train.epochs.x",
            {"choices": [1]},
            r"train\.epochs\.x: 'epochs' is a value, not a section",
        ),
        (
            "model.dropout",
            {"low": 0.0, "high": 1.0},
            r"model\.dropout, value 1\.0:\n.*model\.dropout: .*less than 1; got 1\.0",
        ),
        (
            "train.epochs",
            {"low": 0, "high": 4},
            r"train\.epochs, value 0:\n.*greater than or equal to 1; got 0",
        ),
        (
            "train.optimizer",
            {"choices": ["adam", "sgd"]},
            r"train\.optimizer, value 'sgd':\n.*'adam' or 'adagrad'; got 'sgd'",
        ),
        ("model.hidden", {"choices": [["x"]]}, r"model\.hidden\.0: .*valid integer.*got 'x'"),
    ],
)
def test_a_space_that_does_not_fit_is_told_by_key(config, key, distribution, message):
    values = config.model_dump() | {"tune": {"space": {key: distribution}}}
    with pytest.raises(ConfigError, match=message):
        check_space(type(config).model_validate(values))


def test_a_space_that_fits(config):
    space = {
        "model.hidden": {"choices": [[], [64]]},
        "train.learning_rate": {"low": 1e-4, "high": 0.1},
    }
    check_tunable(type(config).model_validate(config.model_dump() | {"tune": {"space": space}}))


def test_an_empty_space_cannot_be_tuned(config):
    check_space(config)
    with pytest.raises(ConfigError, match=r"tune\.space is empty: say what to vary, such as"):
        check_tunable(config)


def test_overrides_are_taken_as_they_are_and_the_rest_stays(config):
    odd = with_values(config, {"data.item_name": "a ${b} \x85"})
    changed = overridden(odd, ["export.diversity={relevance: 0.5}", "evaluation.k=[1,20]"])
    assert changed.data.item_name == "a ${b} \x85"
    assert changed.export.diversity.relevance == 0.5
    assert changed.evaluation.k == (1, 20)
    with pytest.raises(ConfigError, match=r"export\.divers"):
        overridden(config, ["export.divers=1"])
