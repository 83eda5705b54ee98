import pytest
import tensorflow as tf

from recsys.artifacts import Scoring
from training.chief import (
    coordinator,
    from_chief,
    is_chief,
    wait_for_chief,
    wait_for_steps,
    without_strategy,
)
from training.distribute import launch


def test_alone_everyone_is_the_chief():
    assert is_chief()
    assert from_chief({"b": 0.1, "a": 2.0}) == {"b": 0.1, "a": 2.0}
    wait_for_chief()
    assert coordinator() is None
    wait_for_steps()


def test_a_strategy_can_be_left_for_a_call():
    with tf.distribute.MirroredStrategy().scope():
        assert tf.distribute.has_strategy()
        assert not without_strategy(tf.distribute.has_strategy)
        with pytest.raises(KeyError, match="x"):
            without_strategy(lambda: {}["x"])


@pytest.mark.spark
def test_workers_see_each_other_and_what_the_driver_forwards(
    two_workers, launched, spark, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cret")
    monkeypatch.setenv("SOMETHING_ELSE", "stays here")
    result = launch(
        launched.look_around, two_workers, tmp_path, folder=tmp_path, spark=lambda: spark
    )
    assert isinstance(result, Scoring)
    assert result.directory == tmp_path
    for rank in range(2):
        seen = (tmp_path / f"seen-{rank}").read_text().split("\n")
        assert seen == [
            "replicas=2",
            "agreed={'rank': 0.0, 'pid': 7.0}",
            "gpus=",
            "secret=s3cret",
        ]
