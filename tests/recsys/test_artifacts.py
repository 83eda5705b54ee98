import pytest

from recsys.artifacts import ArtifactError, Promotion, RegisteredModel, TrainedModel
from recsys.schema import Feature, Schema


def registered(directory):
    return RegisteredModel(
        directory=directory, name="shop", model_version="3", uri="models:/shop/3", run_id="r"
    )


def test_round_trip_and_the_folder_can_be_moved(tmp_path):
    saved = registered(tmp_path / "old").save()
    (tmp_path / "old").rename(tmp_path / "new")
    loaded = RegisteredModel.load(tmp_path / "new")
    assert loaded.directory == tmp_path / "new"
    assert loaded.model_dump() == saved.model_dump()


def test_an_unfinished_step_says_which_command_to_run(tmp_path):
    assert not RegisteredModel.exists(tmp_path)
    with pytest.raises(ArtifactError, match="run `recsys register` first"):
        RegisteredModel.load(tmp_path)


def test_a_manifest_of_another_step_is_refused(tmp_path):
    registered(tmp_path).save()
    with pytest.raises(ArtifactError, match="is not a manifest of `promote`"):
        Promotion.load(tmp_path)


def test_a_manifest_of_a_later_format_is_refused(tmp_path):
    registered(tmp_path).save()
    file = tmp_path / "manifest.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ArtifactError, match="version"):
        RegisteredModel.load(tmp_path)


def test_a_curve_that_is_not_finite_can_be_read_again(tmp_path):
    features = Schema(
        features=(
            Feature(name="h", side="query", kind="history", of="i"),
            Feature(name="i", side="candidate", kind="id", column="item"),
        )
    )
    TrainedModel(
        directory=tmp_path,
        towers="towers",
        features=features,
        embedding_dim=2,
        best_epoch=1,
        monitor="ndcg@20",
        curves={"loss": [1.0, float("nan"), float("inf")]},
        mlflow_run_id=None,
        versions={},
    ).save()
    loss = TrainedModel.load(tmp_path).curves["loss"]
    assert loss[0] == 1.0
    assert loss[1] != loss[1]
    assert loss[2] == float("inf")
