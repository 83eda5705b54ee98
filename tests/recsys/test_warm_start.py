"""Begin with the champion of the finished run, and with the run itself."""

import shutil
from datetime import timedelta

import numpy as np
import pytest
from mlflow import MlflowClient

from recsys.artifacts import ArtifactError, ExportedModel, PreparedData, TrainedModel
from recsys.config import ConfigError
from recsys.overrides import with_values
from recsys.run_folder import RunFolder
from recsys.warm_start import WarmStart, begun_with
from training.fit import fit


@pytest.fixture
def next_config(finished_run, config):
    """Of a run that begins with the champion of the finished one."""
    tracking = f"sqlite:///{finished_run.parent / 'mlflow.db'}"
    values = {"train.warm_start": "champion", "cluster.tracking_uri": tracking}
    return with_values(config, values | {"train.epochs": 1, "train.refit": True})


@pytest.fixture
def data(finished_run):
    return PreparedData.load(finished_run / "data")


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "next")


def test_a_fit_begins_where_the_champion_ended_and_a_resumed_one_does_not_begin_again(
    finished_run, next_config, data, folder, caplog
):
    directory = folder.step("model")
    start = WarmStart(next_config, folder).copy(data, directory, begun=False)
    assert start.source == "models:/planted/1"
    with caplog.at_level("INFO"):
        model = fit(begun_with(next_config, start), data, directory)
    assert model.started_from == "models:/planted/1"
    assert model.learned_until == data.train.last_at
    # Both the training and the refit after it.
    assert caplog.text.count("weights of models:/planted/1: ") == 2
    scratch = TrainedModel.load(finished_run / "model")
    metric = next_config.train.monitor
    assert scratch.started_from is None
    assert model.curves[metric][0] > scratch.curves[metric][0]

    (directory / "manifest.json").unlink()
    shutil.rmtree(directory / "checkpoints" / "refit")
    caplog.clear()
    longer = with_values(next_config, {"train.epochs": 2})
    again = WarmStart(longer, folder).copy(data, directory, begun=True)
    assert again == start
    with caplog.at_level("INFO"):
        resumed = fit(begun_with(longer, again), data, directory)
    assert "resume after epoch 1" in caplog.text
    assert caplog.text.count("weights of models:/planted/1: ") == 1
    np.testing.assert_array_equal(resumed.curves[metric][0], model.curves[metric][0])


def test_the_run_of_the_champion_holds_what_a_later_run_begins_with(finished_run, next_config):
    digest = ExportedModel.load(finished_run / "export").digest
    model = TrainedModel.load(finished_run / "model")
    client = MlflowClient(next_config.cluster.tracking_uri)
    logged = client.list_artifacts(model.mlflow_run_id, f"start/{digest}")
    assert {file.path.rsplit("/", 1)[1] for file in logged} == {"manifest.json", "towers"}
    tags = client.get_run(model.mlflow_run_id).data.tags
    assert tags["recsys.started_from"] == "from scratch"


def test_without_a_champion_a_run_trains_from_scratch_and_says_so(
    next_config, data, folder, caplog
):
    first = with_values(next_config, {"registry.model": "not_yet"})
    WarmStart(first, folder).check()
    with caplog.at_level("INFO"):
        assert WarmStart(first, folder).copy(data, folder.step("model"), begun=False) is None
    assert "no version of not_yet is champion yet: fit from scratch" in caplog.text
    assert begun_with(first, None).train.warm_start is None
    # There is a champion by now, but this fit has begun without.
    assert WarmStart(next_config, folder).copy(data, folder.step("model"), begun=True) is None


def test_a_run_folder_is_a_start_and_the_copy_outlives_it(next_config, finished_run, data, folder):
    config = with_values(next_config, {"train.warm_start": str(finished_run)})
    start = WarmStart(config, folder).copy(data, folder.step("model"), begun=False)
    assert start.source == str(finished_run)
    gone = with_values(config, {"train.warm_start": str(folder.path / "gone")})
    assert WarmStart(gone, folder).copy(data, folder.step("model"), begun=True) == start
    with pytest.raises(
        ArtifactError, match=r"train\.warm_start=.*gone holds no model: expected ch"
    ):
        WarmStart(gone, RunFolder(folder.path / "other")).check()


def test_what_does_not_fit_leaves_nothing(next_config, data, folder):
    other = with_values(next_config, {"model.embedding_dim": 8})
    for begin in (
        WarmStart(other, folder).check,
        lambda: WarmStart(other, folder).copy(data, folder.step("model"), begun=False),
    ):
        with pytest.raises(
            ConfigError, match=r"model\.embedding_dim=8 does not fit models:/planted"
        ):
            begin()
    earlier = data.validation.model_copy(
        update={"first_at": data.train.last_at - timedelta(days=1)}
    )
    overlapping = data.model_copy(update={"validation": earlier})
    with pytest.raises(ArtifactError, match=r"models:/planted/1 .* has learned labels until"):
        WarmStart(next_config, folder).copy(overlapping, folder.step("model"), begun=False)
    assert not folder.path.exists()


def test_the_next_fit_of_a_run_may_begin_with_something_else(next_config, finished_run, folder):
    scratch = with_values(next_config, {"train.warm_start": None})
    folder.freeze(scratch)
    warm_start = WarmStart(scratch, folder)
    with pytest.raises(ConfigError, match=r"began with train\.warm_start=None and was interrupted"):
        warm_start.change("champion", begun=True)
    with pytest.raises(ConfigError, match="is this run itself"):
        warm_start.change(str(folder.path), begun=False)
    assert folder.config() == scratch
    changed = warm_start.change(str(finished_run), begun=False)
    assert (
        folder.config() == changed == with_values(scratch, {"train.warm_start": str(finished_run)})
    )
    assert WarmStart(changed, folder).change(str(finished_run), begun=True) == changed
    # Told before the fit that is there is taken away.
    data = PreparedData.load(finished_run / "data")
    early = data.validation.model_copy(update={"first_at": data.train.first_at})
    moved = data.model_copy(update={"directory": folder.step("data"), "validation": early})
    moved.save()
    with pytest.raises(ArtifactError, match="has learned labels until"):
        warm_start.change(str(finished_run), begun=False)
    assert WarmStart(changed, folder).change("none", begun=False) == scratch
    assert folder.config() == scratch
