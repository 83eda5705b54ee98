import shutil

import pytest

from recsys.artifacts import ArtifactError
from recsys.config import ConfigError, load_config
from recsys.opened import config_file
from recsys.run_folder import RunFolder


@pytest.fixture
def config():
    return load_config(config_file("eshop_clothing"))


def test_the_frozen_config_is_the_config(tmp_path, config):
    folder = RunFolder(tmp_path / "run")
    folder.freeze(config)
    assert folder.config() == config


def test_another_config_in_the_same_folder_is_refused_by_key(tmp_path, config):
    folder = RunFolder(tmp_path)
    folder.freeze(config)
    changed = load_config(config_file("eshop_clothing"), ["train.epochs=3"])
    with pytest.raises(ConfigError, match=r"train\.epochs was 8, now 3"):
        folder.freeze(changed)
    assert folder.config() == config


def test_the_cluster_may_change_within_a_run(tmp_path, config):
    folder = RunFolder(tmp_path)
    folder.freeze(config)
    moved = load_config(config_file("eshop_clothing"), ["cluster.tracking_uri=databricks"])
    folder.freeze(moved)
    assert folder.config().cluster.tracking_uri == "databricks"


def test_what_is_tuned_may_change_within_a_run(tmp_path, config):
    folder = RunFolder(tmp_path)
    folder.freeze(config)
    folder.freeze(load_config(config_file("eshop_clothing"), ["tune.trials=7"]))
    assert folder.config().tune.trials == 7


def test_limits_of_drift_may_change_within_a_run(tmp_path):
    folder = RunFolder(tmp_path)
    folder.freeze(load_config(config_file("eshop_clothing")))
    folder.freeze(load_config(config_file("eshop_clothing"), ["monitoring.psi=0.5"]))
    assert folder.config().monitoring.psi == 0.5


@pytest.mark.parametrize(
    ("change", "step"),
    [
        ("export.availability=true", "export"),
        ("export.index.min_recall=0.9", "export"),
        ("registry.model=other", "register"),
        ("registry.gate.max_slice_drop=0.2", "promote"),
        ("scoring.k=7", None),
    ],
)
def test_what_training_does_not_know_may_change_within_a_run(tmp_path, config, change, step):
    folder = RunFolder(tmp_path)
    changed = load_config(config_file("eshop_clothing"), [change])
    assert folder.outdated(changed) is None
    folder.freeze(config)
    assert folder.outdated(config) is None
    assert folder.outdated(changed) == step
    folder.freeze(changed)
    assert folder.config() == changed


def test_the_first_of_several_steps_is_named_and_one_fixed_key_refuses_all(tmp_path, config):
    folder = RunFolder(tmp_path)
    folder.freeze(config)
    both = ["registry.gate.min_slice_queries=9", "export.index.min_recall=0.9"]
    assert folder.outdated(load_config(config_file("eshop_clothing"), both)) == "export"
    with pytest.raises(
        ConfigError, match=r"other settings: model\.dropout was 0.2, now 0.1\. Give"
    ):
        folder.outdated(load_config(config_file("eshop_clothing"), [*both, "model.dropout=0.1"]))


def test_a_folder_of_something_else_is_left_alone(tmp_path, config):
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="holds no run, but model: give --run-dir a new"):
        RunFolder(tmp_path).freeze(config)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_run_keeps_its_token_and_a_new_one_in_the_same_place_has_another(tmp_path, config):
    folder = RunFolder(tmp_path / "run")
    folder.freeze(config)
    token = folder.token()
    assert RunFolder(tmp_path / "run").token() == token
    shutil.rmtree(folder.path)
    assert folder.token() != token


def test_a_folder_without_a_run_says_how_to_start_one(tmp_path):
    with pytest.raises(ArtifactError, match="start with `recsys run`"):
        RunFolder(tmp_path).config()
    assert RunFolder(tmp_path).step("data") == tmp_path / "data"


def test_a_config_of_another_version_of_the_package_is_told(tmp_path, config):
    folder = RunFolder(tmp_path)
    folder.freeze(config)
    told = folder.config_file.read_text().replace('"epochs"', '"rounds"')
    folder.config_file.write_text(told)
    with pytest.raises(ConfigError, match=r"another version of this package:\n.*train.*rounds"):
        folder.config()
