"""A Spark standalone cluster whose hosts say that they have GPUs: slots, devices, and a fit."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pyspark
import pytest

from recsys.artifacts import TrainedModel

SPARK_CLASS = Path(pyspark.__file__).parent / "bin" / "spark-class"
DEPLOY = "org.apache.spark.deploy"
#: Two executors of three cores and four GPUs each, two GPUs a task: four slots, not six.
SCRIPT = """
import sys
from pathlib import Path

import training.preflight
from recsys.artifacts import PreparedData
from recsys.config import Cluster, RunConfig
from training.distribute import launch
from training.fit import fit
from training.session import spark_session

master, discover, functions, config, data, folder = sys.argv[1:]
folder = Path(folder)
gpus = {
    "spark.executor.resource.gpu.amount": "4",
    "spark.executor.resource.gpu.discoveryScript": discover,
    "spark.task.resource.gpu.amount": "2",
}
memory = {"spark.driver.memory": "512m", "spark.executor.memory": "512m"}
cluster = Cluster(kind="spark", workers=2, master=master, spark=gpus | memory, max_restarts=0)
spark = spark_session(cluster, "standalone")
spark.sparkContext.addPyFile(functions)
sys.path.append(str(Path(functions).parent))
import launched

launch(launched.look_around, cluster, folder, folder=folder, spark=lambda: spark)
training.preflight._SLOT_SECONDS = 1
try:
    many = cluster.model_copy(update={"workers": 5})
    training.preflight.check_cluster(spark, many, folder)
except training.preflight.ClusterError as error:
    print(error)
config = RunConfig.model_validate_json(Path(config).read_text())
model = folder / "model"
launch(fit, cluster, config, PreparedData.load(Path(data)), model, folder=model, spark=lambda: spark)
"""


@pytest.fixture
def master(tmp_path):
    """URL of a master with two workers, each a JVM of its own that offers four GPUs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"spark://127.0.0.1:{port}"
    discover = tmp_path / "discover"
    discover.write_text(
        """#!/bin/sh\necho '{"name": "gpu", "addresses": ["0", "1", "2", "3"]}'\n"""
    )
    discover.chmod(0o755)
    option = "-Dspark.worker.resource.gpu"
    gpus = f"{option}.amount=4 {option}.discoveryScript={discover}"
    environment = os.environ | {"SPARK_WORKER_OPTS": gpus, "SPARK_DAEMON_MEMORY": "256m"}
    host = ["--host", "127.0.0.1", "--webui-port", "0"]
    resources = ["--cores", "3", "--memory", "600m", "--work-dir", str(tmp_path / "work")]
    commands = [
        [f"{DEPLOY}.master.Master", *host, "--port", str(port)],
        *([[f"{DEPLOY}.worker.Worker", *host, *resources, url]] * 2),
    ]
    with (tmp_path / "cluster.log").open("w") as log:
        started = [
            subprocess.Popen([SPARK_CLASS, *command], env=environment, stdout=log, stderr=log)
            for command in commands
        ]
    yield url, discover
    for process in started:
        process.terminate()
    for process in started:
        process.wait(30)


@pytest.mark.spark
def test_two_workers_train_on_a_standalone_cluster_with_gpus(master, config, prepared, tmp_path):
    url, discover = master
    train = config.train.model_copy(update={"epochs": 1})
    file = tmp_path / "config.json"
    file.write_text(config.model_copy(update={"train": train}).model_dump_json())
    functions = Path(__file__).parent / "training" / "launched.py"
    places = [url, discover, functions, file, prepared.directory, tmp_path]
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, places)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert answer.returncode == 0, answer.stderr + (tmp_path / "cluster.log").read_text()
    assert "cluster.workers=5 need as many free task slots, the cluster has 4" in answer.stdout
    seen = [(tmp_path / f"seen-{rank}").read_text().split("\n") for rank in range(2)]
    assert {lines[0] for lines in seen} == {"replicas=2"}
    # On one executor or on two: two GPUs each, and never one that the other has.
    assert all(lines[2] in ("gpus=0,1", "gpus=2,3") for lines in seen), seen
    assert len(TrainedModel.load(tmp_path / "model").curves["loss"]) == 1
