import stat
import subprocess
import sys

import pytest

from recsys.config import Cluster
from training.session import JavaError, check_java, spark_session, watched


def fake_java(folder, version):
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True, exist_ok=True)
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2024-01-16' >&2\n")
    java.chmod(java.stat().st_mode | stat.S_IEXEC)
    return folder


@pytest.mark.parametrize("version", ["17.0.15", "21", "21.0.2", "25.0.1"])
def test_java_that_spark_runs_on(monkeypatch, tmp_path, version):
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path, version)))
    check_java()


@pytest.mark.parametrize(
    ("version", "found"), [("1.8.0_392", 8), ("11.0.2", 11), ("16.0.1", 16), ("18.0.1", 18)]
)
def test_java_of_another_version(monkeypatch, tmp_path, version, found):
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path, version)))
    with pytest.raises(JavaError, match=f"needs Java 17 or 21, found Java {found} at .*apt-get"):
        check_java()


def test_java_on_the_path(monkeypatch, tmp_path):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(fake_java(tmp_path, "17.0.1") / "bin"), prepend=":")
    check_java()


def test_no_java(monkeypatch, tmp_path):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = "found none: sudo apt-get install openjdk-17-jre-headless"
    with pytest.raises(JavaError, match=expected):
        check_java()


def test_java_home_without_java(monkeypatch, tmp_path):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(JavaError, match=rf"found none \(JAVA_HOME={tmp_path}\): unset JAVA_HOME"):
        check_java()


def test_something_that_is_no_java(monkeypatch, tmp_path):
    java = fake_java(tmp_path, "17") / "bin" / "java"
    java.write_text("#!/bin/sh\nexit 3\n")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(JavaError, match="found an unknown version"):
        check_java()


def test_a_running_session_is_used_and_knows_tfrecord(spark, tmp_path):
    session = spark_session(Cluster(master=None), "cluster")
    assert session.sparkContext is spark.sparkContext
    assert session.conf.get("spark.sql.session.timeZone") == "UTC"
    folder = str(tmp_path / "records")
    session.range(3).write.format("tfrecord").mode("overwrite").save(folder)
    assert session.read.format("tfrecord").load(folder).count() == 3


START = """
import sys
from recsys.config import Cluster
from training.session import spark_session
spark = spark_session(Cluster(master="local[1]", spark={"spark.driver.memory": "1g"}), "quiet")
spark.sparkContext.parallelize([1], 1).map(lambda x: sys.executable).collect()
conf = spark.sparkContext.getConf()
print(conf.get("spark.driver.memory"), conf.get("spark.ui.enabled"),
      spark.conf.get("spark.sql.session.timeZone"), spark.range(5).count(),
      spark.sparkContext.parallelize([1], 1).map(lambda x: sys.executable).first())
spark.stop()
again = spark_session(Cluster(master="local[1]"), "again")
print(again.range(2).count())
"""


def test_a_local_session_starts_quietly():
    ran = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [f"1g false UTC 5 {sys.executable}", "2"]
    assert ran.stderr == ""


def test_who_watches_a_block_is_told_that_it_is_over():
    seen = []
    with (
        pytest.raises(RuntimeError, match="the job"),
        watched(lambda over: seen.append(over.wait(60))),
    ):
        assert seen == []
        raise RuntimeError("the job")
    assert seen == [True]
