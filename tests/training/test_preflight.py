import importlib.metadata
import os
import time

import pytest

from training.attempt import WorkersLost
from training.preflight import (
    ClusterError,
    _check_report,
    _explained,
    _warn_of_idle_gpus,
    check_cluster,
)


@pytest.mark.spark
def test_too_few_slots_are_told(two_workers, spark, tmp_path, monkeypatch):
    monkeypatch.setattr("training.preflight._SLOT_SECONDS", 0)
    many = two_workers.model_copy(update={"workers": 3})
    with pytest.raises(ClusterError, match=r"workers=3 need as many .* the cluster has 2"):
        check_cluster(spark, many, tmp_path)
    fewer = many.model_copy(update={"min_workers": 1})
    assert check_cluster(spark, fewer, tmp_path) == 2
    with_servers = fewer.model_copy(update={"kind": "spark_parameter_server", "servers": 2})
    with pytest.raises(ClusterError, match=r"slots, 3 more of chief and servers, the cluster has"):
        check_cluster(spark, with_servers, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.spark
def test_other_packages_on_executors_are_told(two_workers, spark, tmp_path, monkeypatch):
    real = importlib.metadata.version
    changed = {"tensorflow": "1.15"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: changed.get(name) or real(name))
    with pytest.raises(ClusterError, match=r"tensorflow is 1\.15 on the driver, but 2\..* on "):
        check_cluster(spark, two_workers, tmp_path)


@pytest.mark.spark
def test_dynamic_allocation_is_refused(two_workers, spark, tmp_path, monkeypatch):
    # What a context was started with; this one cannot be started anew within the tests.
    conf = spark.sparkContext.getConf().set("spark.dynamicAllocation.enabled", "true")
    monkeypatch.setattr(spark.sparkContext, "_conf", conf)
    with pytest.raises(ClusterError, match=r"set spark\.dynamicAllocation\.enabled=false"):
        check_cluster(spark, two_workers, tmp_path)


def test_spark_connect_is_refused(two_workers, tmp_path):
    # Spark's own class is not to be had without gRPC.
    session = type("SparkSession", (), {"__module__": "pyspark.sql.connect.session"})()
    with pytest.raises(ClusterError, match="Spark Connect"):
        check_cluster(session, two_workers, tmp_path)


def test_what_executors_report_is_compared(tmp_path):
    own = {"host": "driver", "shared": "", "python": "3.11.7"}
    _check_report(own | {"host": "h"}, own, tmp_path)
    with pytest.raises(ClusterError, match=r"python is 3\.11\.7 on the driver, but 3\.9\.1 on h"):
        _check_report(own | {"host": "h", "python": "3.9.1"}, own, tmp_path)
    with pytest.raises(ClusterError, match=r"must be shared by .*, but on h: No such file"):
        _check_report(own | {"host": "h", "shared": "No such file"}, own, tmp_path)


@pytest.mark.spark
def test_an_executor_that_does_not_answer_is_told(two_workers, spark, tmp_path, monkeypatch):
    monkeypatch.setattr("training.preflight._PROBE_SECONDS", 3)
    monkeypatch.setattr("training.preflight._looking", hanging)
    with pytest.raises(ClusterError, match=r"have not answered within 3 s: a mount"):
        check_cluster(spark, two_workers, tmp_path)


@pytest.mark.spark
def test_tasks_that_have_no_slot_any_more_are_not_waited_for(
    two_workers, spark, tmp_path, monkeypatch
):
    slots = iter([2])
    monkeypatch.setattr("training.preflight._slots", lambda _: next(slots, 1))
    monkeypatch.setattr("training.preflight._looking", hanging)
    with pytest.raises(WorkersLost, match="an executor was lost before the workers started"):
        check_cluster(spark, two_workers, tmp_path)


def hanging(_token):
    driver = os.getpid()

    def look(_rows):
        if os.getpid() != driver:
            time.sleep(600)
        yield {}

    return look


def test_idle_gpus_are_told(caplog):
    _warn_of_idle_gpus([{"host": "a", "gpus": "0"}])
    assert not caplog.text
    _warn_of_idle_gpus([{"host": "a", "gpus": "0"}, {"host": "b", "gpus": "2"}])
    assert "although there are GPUs (2 on b)" in caplog.text
    assert "spark.task.resource.gpu.amount" in caplog.text


@pytest.mark.spark
def test_shared_gpus_are_refused(two_workers, spark, tmp_path, monkeypatch):
    conf = spark.sparkContext.getConf().set("spark.task.resource.gpu.amount", "0.5")
    monkeypatch.setattr(spark.sparkContext, "_conf", conf)
    with pytest.raises(ClusterError, match=r"gpu\.amount=0\.5 makes workers share a GPU"):
        check_cluster(spark, two_workers, tmp_path)
    conf.set("spark.task.resource.gpu.amount", "2")
    servers = two_workers.model_copy(update={"kind": "spark_parameter_server"})
    with pytest.raises(ClusterError, match=r"gpu\.amount=2: .* would learn the same batches"):
        check_cluster(spark, servers, tmp_path)


def test_lost_executors_are_told_from_broken_ones():
    lost = _explained(RuntimeError("Could not recover from a failed barrier ResultStage"))
    assert isinstance(lost, WorkersLost)
    trace = (
        "api.python.PythonException: Traceback\n  File x\nModuleNotFoundError: No module named y"
    )
    broken = _explained(RuntimeError(trace))
    assert isinstance(broken, ClusterError)
    assert "ModuleNotFoundError: No module named y" in str(broken)
