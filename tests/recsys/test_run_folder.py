import shutil

import pytest

from recsys.artifacts import ArtifactError
from recsys.cli import _config_file
from recsys.config import ConfigError, load_config
from recsys.run_folder import RunFolder


@pytest.fixture
def config():
    return load_config(_config_file("eshop_clothing"))


def test_the_frozen_config_is_the_config(tmp_path, config):
    folder = RunFolder(tmp_path / "run")
    folder.freeze(config)
    assert folder.config() == config


def test_another_config_in_the_same_folder_is_refused_by_key(tmp_path, config):
    folder = RunFolder(tmp_path)
    folder.freeze(config)
    changed = load_config(_config_file("eshop_clothing"), ["train.epochs=3"])
    with pytest.raises(ConfigError, match=r"train\.epochs was 8, now 3"):
        folder.freeze(changed)
    assert folder.config() == config


def test_the_cluster_may_change_within_a_run(tmp_path, config):
    folder = RunFolder(tmp_path)
    folder.freeze(config)
    moved = load_config(_config_file("eshop_clothing"), ["cluster.tracking_uri=databricks"])
    folder.freeze(moved)
    assert folder.config().cluster.tracking_uri == "databricks"


def test_what_is_tuned_may_change_within_a_run(tmp_path, config):
    folder = RunFolder(tmp_path)
    folder.freeze(config)
    folder.freeze(load_config(_config_file("eshop_clothing"), ["tune.trials=7"]))
    assert folder.config().tune.trials == 7


def test_limits_of_drift_may_change_within_a_run(tmp_path):
    folder = RunFolder(tmp_path)
    folder.freeze(load_config(_config_file("eshop_clothing")))
    folder.freeze(load_config(_config_file("eshop_clothing"), ["monitoring.psi=0.5"]))
    assert folder.config().monitoring.psi == 0.5


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
