import numpy as np
import pytest
import tensorflow as tf
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from recsys.artifacts import ArtifactError, Promotion, RegisteredModel
from serving_export import registry as module
from serving_export.registry import (
    ModelVersion,
    champion,
    connect,
    download,
    promote,
    register,
    resolve,
)

BETTER = {"popularity": 0.5, "markov": 0.1}


@pytest.fixture
def client(registry):
    connect(registry.uri)
    return MlflowClient()


@pytest.fixture
def named(world, registry, client, tmp_path):
    """A registered model of its own for a test: (config, register)."""

    def config_for(name, **gate):
        config = world.config.model_copy()
        gate = {"metric": "ndcg@10"} | gate
        changed = config.registry.model_validate({"model": name, "gate": gate})
        return config.model_copy(update={"registry": changed})

    def versions(config, count):
        """Versions that differ in their digest only; they share the files of the first."""
        made = []
        for n in range(1, count + 1):
            if n == 1:
                client.create_registered_model(config.registry.model)
            source = client.get_model_version("tiny", registry.registered.model_version).source
            created = client.create_model_version(config.registry.model, source, registry.run_id)
            made.append(
                RegisteredModel(
                    directory=tmp_path / f"registration {n}",
                    name=config.registry.model,
                    model_version=str(created.version),
                    uri="",
                    run_id=registry.run_id,
                )
            )
        return made

    return config_for, versions


def test_registered_version_tells_what_it_is(world, registry, client):
    registered = registry.registered
    found = client.get_model_version_by_alias("tiny", "challenger")
    assert str(found.version) == registered.model_version == "1"
    assert found.run_id == registry.run_id
    assert found.tags["digest"] == world.exported.digest
    assert found.tags["schema_fingerprint"] == world.exported.fingerprint
    assert found.tags["ndcg_at_10"] == "0.25"
    assert RegisteredModel.load(registered.directory) == registered


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


def test_first_champion_needs_the_baselines_only(named, registry, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("first")
    (version,) = versions(config, 1)
    report = tiny.write_report(tmp_path / "report", [1, 2], BETTER)
    assert champion(config, tmp_path) is None

    promotion = promote(config, version, report, None, tmp_path / "promotion")

    assert promotion.promoted
    assert promotion.previous_version is None
    assert len(promotion.reasons) == 3
    assert promotion.reasons[0].startswith("ndcg@10 +50.0% over popularity (interval +40.0%")
    assert promotion.reasons[2] == "there was no champion to compare with"
    assert Promotion.load(tmp_path / "promotion") == promotion
    number, folder = champion(config, tmp_path)
    assert number == "1"
    model = tf.saved_model.load(str(folder))
    ids, _ = tiny.ask(model, [[tiny.item(1)]], k=3)
    assert len(ids[0]) == 3
    assert not (folder.parent / f".{folder.name}.new").exists()


def test_loser_is_refused_with_reasons_and_the_champion_stays(named, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("loser")
    (version,) = versions(config, 1)
    report = tiny.write_report(tmp_path / "report", [1], {"popularity": 0.5, "markov": -0.1})

    promotion = promote(config, version, report, None, tmp_path)

    assert not promotion.promoted
    assert "fails" in promotion.reasons[1]
    assert "passes" in promotion.reasons[0]
    tags = client.get_model_version("loser", "1").tags
    assert tags["gate_promoted"] == "false"
    assert tags["gate_reason_1"] == promotion.reasons[1]
    with pytest.raises(ArtifactError):
        resolve("loser@champion")


def test_challenger_must_beat_the_champion(named, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("duel", min_lift_over_champion=0.1)
    first, second, third = versions(config, 3)
    weak = tiny.write_report(tmp_path / "weak", [2, 0, 2, 0] * 5, BETTER)
    strong = tiny.write_report(tmp_path / "strong", [1, 2, 1, 2] * 5, BETTER)
    assert promote(config, first, weak, None, tmp_path / "1").promoted

    better = promote(config, second, strong, weak, tmp_path / "2")
    assert better.promoted
    assert better.previous_version == "1"
    assert "over champion version 1 (interval" in better.reasons[-1]

    equal = promote(config, third, strong, strong, tmp_path / "3")
    assert not equal.promoted
    assert equal.previous_version == "2"
    assert equal.reasons[-1].startswith("ndcg@10 +0.0% over champion version 2")
    assert client.get_model_version_by_alias("duel", "champion").version == 2


def test_champion_that_was_not_evaluated_stays(named, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("unseen")
    first, second = versions(config, 2)
    report = tiny.write_report(tmp_path / "report", [1], BETTER)
    promote(config, first, report, None, tmp_path / "1")

    promotion = promote(config, second, report, None, tmp_path / "2")

    assert not promotion.promoted
    assert promotion.reasons[-1] == (
        "champion version 1 was not evaluated on this window, so it stays; to start anew without it, delete its alias 'champion'."
    )


def test_repeated_promotion_tells_the_same_story(named, tiny, tmp_path):
    config_for, versions = named
    config = config_for("again", min_lift_over_champion=0.1)
    first, second = versions(config, 2)
    weak = tiny.write_report(tmp_path / "weak", [3, 3], BETTER)
    strong = tiny.write_report(tmp_path / "strong", [1, 1], BETTER)
    promote(config, first, weak, None, tmp_path / "1")
    done = promote(config, second, strong, weak, tmp_path / "2")

    # After a kill the champion that the caller finds, and evaluates, is the version itself.
    again = promote(config, second, strong, strong, tmp_path / "2")

    assert again.model_dump(exclude={"created_at"}) == done.model_dump(exclude={"created_at"})


def test_champion_made_by_hand_is_told_apart(named, client, tiny, tmp_path):
    config_for, versions = named
    config = config_for("manual")
    (version,) = versions(config, 1)
    client.set_registered_model_alias("manual", "champion", "1")
    report = tiny.write_report(tmp_path / "report", [1], {"popularity": -0.5})
    promotion = promote(config, version, report, None, tmp_path)
    assert promotion.promoted
    assert promotion.reasons == ["it was made champion by hand"]


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
