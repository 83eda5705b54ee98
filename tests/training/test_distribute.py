import numpy as np
import pytest
import tensorflow as tf

from recsys.config import Cluster, RunConfig
from recsys.shards import Shards
from training.distribute import launch
from training.fit import fit


@pytest.fixture(scope="module")
def without_dropout(config):
    """Two epochs with sampled negatives; masks differ between replicas, so there are none.

    Each of two workers reads its own file, and asks the other for its labels.
    """
    values = config.model_dump()
    values["model"]["dropout"] = 0.0
    values["model"]["loss"] |= {
        "full_softmax_up_to": 0,
        "num_uniform_negatives": 20,
        "num_popular_negatives": 5,
    }
    values["train"] |= {"epochs": 2, "global_batch_size": 37, "clip_norm": 1.0, "cache_mib": 0}
    # Adam divides the smallest gradients by themselves, and what rounding has made of them.
    values["train"] |= {"optimizer": "adagrad", "learning_rate": 0.1}
    return RunConfig.model_validate(values)


@pytest.mark.spark
def test_two_workers_train_like_one(two_workers, without_dropout, prepared, spark, tmp_path):
    config = without_dropout
    assert Shards.of(prepared, [prepared.train]).reading(2, 0) == "own files"
    alone = launch(
        fit, Cluster(), config, prepared, tmp_path / "alone", folder=tmp_path, spark=lambda: spark
    )
    together = launch(
        fit,
        two_workers,
        config,
        prepared,
        tmp_path / "both",
        folder=tmp_path / "both",
        spark=lambda: spark,
    )
    assert together.curves.keys() == alone.curves.keys()
    np.testing.assert_allclose(together.curves["loss"], alone.curves["loss"], rtol=1e-5)
    for name, curve in alone.curves.items():
        # A single rank that changes is more than rounding.
        np.testing.assert_allclose(together.curves[name], curve, rtol=2e-3, err_msg=name)
    assert together.best_epoch == alone.best_epoch
    assert (together.directory / together.towers / "saved_model.pb").is_file()
    log = (tmp_path / "both/launch/attempt-0001/rank-0.log").read_text()
    assert "epoch 2: loss" in log
    assert "epoch 2: loss" not in (tmp_path / "both/launch/attempt-0001/rank-1.log").read_text()


def test_only_functions_that_workers_can_import_are_launched(two_workers, spark, tmp_path):
    def local(folder):
        return folder

    with pytest.raises(ValueError, match="workers can import"):
        launch(local, two_workers, tmp_path, folder=tmp_path, spark=lambda: spark)


def test_local_and_mirrored_run_here(tmp_path):
    seen = []

    def look():
        seen.append(type(tf.distribute.get_strategy()).__name__)
        return seen

    for kind in ("local", "mirrored"):
        cluster = Cluster(kind=kind)
        assert launch(look, cluster, folder=tmp_path, spark=lambda: pytest.fail("unused")) is seen
    assert seen == ["_DefaultDistributionStrategy", "MirroredStrategy"]
