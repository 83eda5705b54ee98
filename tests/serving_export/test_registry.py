import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from recsys.artifacts import ArtifactError, RegisteredModel
from serving_export import registry as module
from serving_export.registry import (
    ModelVersion,
    connect,
    download,
    download_logged,
    register,
    resolve,
)


@pytest.fixture
def client(registry):
    connect(registry.uri)
    return MlflowClient()


def test_registered_version_tells_what_it_is(world, registry, client):
    registered = registry.registered
    found = client.get_model_version_by_alias("tiny", "challenger")
    assert str(found.version) == registered.model_version == "1"
    assert found.run_id == registry.run_id
    assert found.tags["digest"] == world.exported.digest
    assert found.tags["schema_fingerprint"] == world.exported.fingerprint
    assert found.tags["ndcg_at_10"] == "0.25"
    assert RegisteredModel.load(registered.directory) == registered


def test_what_a_run_has_logged_is_copied_or_named(registry, client, tmp_path):
    client.log_text(registry.run_id, "kept", "start/d1/manifest.json")
    version = ModelVersion("tiny", "1")
    fetched = download_logged(version, "start/d1", tmp_path)
    assert (fetched / "manifest.json").read_text() == "kept"
    with pytest.raises(
        ArtifactError, match=r"models:/tiny/1: its run \w+ holds no start/d2 that can"
    ):
        download_logged(version, "start/d2", tmp_path)


def test_killed_before_its_manifest_register_ends_in_one_version(world, registry, client, tmp_path):
    client.delete_registered_model_alias("tiny", "challenger")
    again = register(world.config, world.exported, registry.report, registry.run_id, tmp_path)
    assert again.model_version == registry.registered.model_version
    assert len(client.search_model_versions("name='tiny'")) == 1
    assert client.get_model_version_by_alias("tiny", "challenger").version == 1


def test_killed_while_logging_register_starts_over(world, registry, client, tmp_path, monkeypatch):
    config = world.config.model_copy(
        update={"registry": world.config.registry.model_copy(update={"model": "fragile"})}
    )
    arguments = (config, world.exported, registry.report, registry.run_id, tmp_path)
    with monkeypatch.context() as patch:

        def killed(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(module.mlflow, "register_model", killed)
        with pytest.raises(KeyboardInterrupt):
            register(*arguments)
    assert not RegisteredModel.exists(tmp_path)
    assert client.search_model_versions("name='fragile'") == []
    register(*arguments)
    register(*arguments)
    assert [v.version for v in client.search_model_versions("name='fragile'")] == [1]


@pytest.mark.parametrize("reference", ["tiny@challenger", "models:/tiny@challenger", "tiny/1"])
def test_resolve(registry, client, reference):
    client.set_registered_model_alias("tiny", "challenger", "1")
    assert resolve(reference) == ModelVersion("tiny", "1")
    assert resolve(reference).uri == "models:/tiny/1"


@pytest.mark.parametrize("reference", ["tiny@nobody", "tiny/99", "nothing", "nothing@champion"])
def test_resolve_says_what_is_missing_and_how_a_champion_comes(client, reference):
    with pytest.raises(ArtifactError, match=rf"no '{reference}'.*recsys promote"):
        resolve(reference)


def test_download_is_whole_and_done_once(registry, client, tmp_path):
    model = ModelVersion("tiny", "1")
    folder = download(model, tmp_path / "copy")
    assert (folder / "MLmodel").is_file()
    assert (folder / "artifacts" / "scann" / "saved_model.pb").is_file()
    (folder / "mark").write_text("kept")
    assert (download(model, tmp_path / "copy") / "mark").is_file()
    requirements = (folder / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in requirements} == {
        "mlflow", "numpy", "pandas", "scann", "tensorflow",
    }  # fmt: skip
    assert np.all(["==" in line for line in requirements])


def test_server_that_is_gone_fails_soon(registry):
    try:
        connect("http://127.0.0.1:9")
        with pytest.raises(MlflowException, match=r"127\.0\.0\.1"):
            resolve("tiny@champion")
    finally:
        connect(registry.uri)
