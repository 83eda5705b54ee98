import socket
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import Scoring
from recsys.config import Cluster, RunConfig
from recsys.dataset import WHOLE, Order, Share, training_batches
from training.attempt import Attempt, Failure, WorkerError, WorkersLost
from training.barrier import _reserved_port
from training.distribute import launch
from training.fit import fit
from training.preflight import ClusterError, _check_report, _explained, check_cluster

SPARK = Cluster(kind="spark", workers=2, restart_seconds=0, heartbeat_timeout_seconds=10)


@pytest.fixture(scope="module")
def without_dropout(config):
    """Two epochs with sampled negatives; masks differ between replicas, so there are none."""
    values = config.model_dump()
    values["model"]["dropout"] = 0.0
    values["model"]["loss"] |= {
        "full_softmax_up_to": 0,
        "num_uniform_negatives": 20,
        "num_popular_negatives": 5,
    }
    # The last batch of an epoch holds one sequence: a worker has nothing to do in it.
    values["train"] |= {"epochs": 2, "global_batch_size": 37, "clip_norm": 1.0}
    # Adam divides the smallest gradients by themselves, and what rounding has made of them.
    values["train"] |= {"optimizer": "adagrad", "learning_rate": 0.1}
    return RunConfig.model_validate(values)


@pytest.fixture
def launched(spark, monkeypatch):
    """The module of functions to launch, known to driver and executors."""
    file = Path(__file__).with_name("launched.py")
    monkeypatch.syspath_prepend(str(file.parent))
    spark.sparkContext.addPyFile(str(file))
    import launched

    return launched


def test_replicas_share_each_global_batch(prepared):
    def users(share, skip=0):
        stream = training_batches(
            prepared, [prepared.train], 7, Order(range(1), 1, 10_000, skip), share
        )
        return [
            {k: batch[k].numpy() for k in ("label", "known", "pool", "place")} for batch in stream
        ]

    whole = users(WHOLE)
    parts = [users(Share(range(rank, rank + 1), 3)) for rank in range(3)]
    both = users(Share(range(0, 2), 3))
    assert sum(len(batch["label"]) for batch in whole) == prepared.train.num_examples
    for number, batch in enumerate(whole):
        own = [part[number] for part in parts]
        assert all((o["pool"] == batch["label"]).all() for o in own)
        assert all((o["pool"][o["place"]] == o["label"]).all() for o in own)
        places = np.concatenate([o["place"] for o in own])
        assert sorted(places) == list(range(len(batch["label"])))
        for rank in range(2):
            np.testing.assert_array_equal(both[2 * number + rank]["label"], own[rank]["label"])
    rest = users(Share(range(1, 2), 3), skip=4)
    assert len(rest) == len(whole) - 4
    np.testing.assert_array_equal(rest[0]["label"], parts[1][4]["label"])


def test_a_replica_may_have_no_sequence(prepared):
    stream = training_batches(
        prepared, [prepared.train], 1, Order(range(1), 1, 10_000), share=Share(range(1, 2), 2)
    )
    batch = next(iter(stream))
    assert len(batch["label"]) == 0
    assert len(batch["pool"]) > 0
    assert batch["history"].shape[0] == 0


@pytest.mark.spark
def test_two_workers_train_like_one(without_dropout, prepared, spark, tmp_path):
    config = without_dropout
    assert prepared.train.num_sequences % config.train.global_batch_size == 1
    alone = launch(
        fit, Cluster(), config, prepared, tmp_path / "alone", folder=tmp_path, spark=lambda: spark
    )
    together = launch(
        fit,
        SPARK,
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


@pytest.mark.spark
def test_workers_see_each_other_and_what_the_driver_forwards(
    launched, spark, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cret")
    monkeypatch.setenv("SOMETHING_ELSE", "stays here")
    result = launch(launched.look_around, SPARK, tmp_path, folder=tmp_path, spark=lambda: spark)
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


@pytest.mark.spark
def test_an_error_of_the_function_comes_back_from_its_worker_and_is_not_retried(
    launched, spark, tmp_path
):
    with pytest.raises(WorkerError) as caught:
        launch(launched.stumble, SPARK, tmp_path, "raise", folder=tmp_path, spark=lambda: spark)
    told = str(caught.value)
    assert "worker 1 on" in told
    assert "KeyError: 'no such column'" in told
    assert "launched.py" in told  # the traceback
    assert "attempt-0001/rank-1.log:" in told
    assert len(list((tmp_path / "launch").iterdir())) == 1


@pytest.mark.spark
@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_lost_worker_is_noticed_and_the_launch_restarted(launched, spark, tmp_path, caplog, how):
    started = time.monotonic()
    launch(launched.stumble, SPARK, tmp_path, how, folder=tmp_path, spark=lambda: spark)
    assert time.monotonic() - started < 120
    assert len(list((tmp_path / "launch").iterdir())) == 2
    expected = {"kill": "killed by SIGKILL", "freeze": "no sign of life for 10 s"}[how]
    assert expected in caplog.text
    assert Attempt(tmp_path / "launch" / "attempt-0001").is_abandoned()


def test_only_functions_that_workers_can_import_are_launched(spark, tmp_path):
    def local(folder):
        return folder

    with pytest.raises(ValueError, match="workers can import"):
        launch(local, SPARK, tmp_path, folder=tmp_path, spark=lambda: spark)


def test_local_and_mirrored_run_here(tmp_path):
    seen = []

    def look():
        seen.append(type(tf.distribute.get_strategy()).__name__)
        return seen

    for kind in ("local", "mirrored"):
        cluster = Cluster(kind=kind)
        assert launch(look, cluster, folder=tmp_path, spark=lambda: pytest.fail("unused")) is seen
    assert seen == ["_DefaultDistributionStrategy", "MirroredStrategy"]


def test_nobody_else_gets_a_reserved_port():
    with _reserved_port() as port, socket.socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        # TensorFlow's server may, with the same option.
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            server.bind(("", port))
            server.listen()
            socket.create_connection(("127.0.0.1", port)).close()


@pytest.mark.spark
def test_too_few_slots_are_told(spark, tmp_path, monkeypatch):
    monkeypatch.setattr("training.preflight._SLOT_SECONDS", 0)
    many = SPARK.model_copy(update={"workers": 3})
    with pytest.raises(ClusterError, match=r"workers=3 need as many .* the cluster has 2"):
        check_cluster(spark, many, tmp_path)
    fewer = many.model_copy(update={"min_workers": 1})
    assert check_cluster(spark, fewer, tmp_path) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.spark
def test_other_packages_on_executors_are_told(spark, tmp_path, monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version
    changed = {"tensorflow": "1.15"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: changed.get(name) or real(name))
    with pytest.raises(ClusterError, match=r"tensorflow is 1\.15 on the driver, but 2\..* on "):
        check_cluster(spark, SPARK, tmp_path)


@pytest.mark.spark
def test_dynamic_allocation_is_refused(spark, tmp_path, monkeypatch):
    # What a context was started with; this one cannot be started anew within the tests.
    conf = spark.sparkContext.getConf().set("spark.dynamicAllocation.enabled", "true")
    monkeypatch.setattr(spark.sparkContext, "_conf", conf)
    with pytest.raises(ClusterError, match=r"set spark\.dynamicAllocation\.enabled=false"):
        check_cluster(spark, SPARK, tmp_path)


def test_spark_connect_is_refused(tmp_path):
    # Spark's own class is not to be had without gRPC.
    session = type("SparkSession", (), {"__module__": "pyspark.sql.connect.session"})()
    with pytest.raises(ClusterError, match="Spark Connect"):
        check_cluster(session, SPARK, tmp_path)


def failure(kind, rank, log):
    return Failure(kind=kind, rank=rank, host="h", log=log, message=f"{kind}!", trace="Traceback")


def test_the_cause_is_found_among_the_failures(tmp_path):
    attempt = Attempt.next_in(tmp_path)
    attempt.log(1).write_text("one\ntwo\n")
    assert str(attempt.diagnosis("Spark says so")) == "Spark says so"
    attempt.fail(failure("peer", 0, attempt.log(0)))
    assert isinstance(attempt.diagnosis(""), WorkersLost)
    attempt.fail(failure("error", 1, attempt.log(1)))
    told = attempt.diagnosis("")
    assert isinstance(told, WorkerError)
    assert str(told) == f"worker 1 on h: error! (log {attempt.log(1)}:2)\nTraceback"
    attempt.fail(failure("lost", 2, attempt.log(2)))
    assert "worker 2 on h: lost!" in str(attempt.diagnosis(""))
    assert isinstance(attempt.diagnosis(""), WorkersLost)


def test_a_new_attempt_gives_the_earlier_ones_up(tmp_path):
    first = Attempt.next_in(tmp_path)
    assert not first.is_abandoned()
    second = Attempt.next_in(tmp_path)
    assert (first.folder.name, second.folder.name) == ("attempt-0001", "attempt-0002")
    assert first.is_abandoned()
    with pytest.raises(WorkersLost, match="left no"):
        second.result()
    second.succeed({"a": 1})
    assert second.result() == {"a": 1}
    assert second.sign(0) == ""


def test_what_executors_report_is_compared(tmp_path):
    own = {"host": "driver", "shared": "", "python": "3.11.7"}
    _check_report(own | {"host": "h"}, own, tmp_path)
    with pytest.raises(ClusterError, match=r"python is 3\.11\.7 on the driver, but 3\.9\.1 on h"):
        _check_report(own | {"host": "h", "python": "3.9.1"}, own, tmp_path)
    with pytest.raises(ClusterError, match=r"must be shared by .*, but on h: No such file"):
        _check_report(own | {"host": "h", "shared": "No such file"}, own, tmp_path)


def test_lost_executors_are_told_from_broken_ones():
    lost = _explained(RuntimeError("Could not recover from a failed barrier ResultStage"))
    assert isinstance(lost, WorkersLost)
    trace = (
        "api.python.PythonException: Traceback\n  File x\nModuleNotFoundError: No module named y"
    )
    broken = _explained(RuntimeError(trace))
    assert isinstance(broken, ClusterError)
    assert "ModuleNotFoundError: No module named y" in str(broken)
