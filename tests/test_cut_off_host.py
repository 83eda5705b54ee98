"""A host is cut off from the network in the middle: hosts are network namespaces behind a bridge."""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pyspark
import pytest
from disturbed import command_line, end_fit, wait_for, worker

from recsys.artifacts import TrainedModel
from training.attempt import Attempt

#: Several processes that each start TensorFlow more than once, beside other tests.
pytestmark = pytest.mark.timeout(1500)

SPARK_CLASS = Path(pyspark.__file__).parent / "bin" / "spark-class"
DEPLOY = "org.apache.spark.deploy"
PATIENCE = 400
EPOCHS = 2
#: Two hosts, of which one is enough. By default Spark takes two minutes to miss an executor.
SCRIPT = """
import logging
import sys
from pathlib import Path

import training.preflight
from recsys.artifacts import PreparedData
from recsys.config import Cluster, RunConfig
from training.distribute import launch
from training.fit import fit, saved
from training.session import spark_session

url, outside, config, data, folder = sys.argv[1:]
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s")
settings = {
    "spark.driver.host": outside,
    "spark.driver.bindAddress": outside,
    "spark.driver.memory": "512m",
    "spark.executor.memory": "512m",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.network.timeout": "10s",
    "spark.network.timeoutInterval": "2s",
    "spark.executor.heartbeatInterval": "2s",
}
cluster = Cluster(
    kind="spark", master=url, workers=2, min_workers=1, restart_seconds=1, spark=settings
)
# A host that is lost comes back in a minute, or so it is hoped.
training.preflight._SLOT_SECONDS = 3
config = RunConfig.model_validate_json(Path(config).read_text())
model = Path(folder)
data = PreparedData.load(Path(data))
session = lambda: spark_session(cluster, "cut off")
launch(fit, cluster, config, data, model, folder=model, spark=session, saved=lambda: saved(model))
"""


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def ip_if_permitted(*words):
    """As `ip`; skips the test where a container or a kernel has no networks of its own."""
    try:
        ip(*words)
    except subprocess.CalledProcessError as error:
        if any(
            told in error.stderr for told in ("not permitted", "not supported", "Unknown device")
        ):
            pytest.skip(f"ip {' '.join(words)} is not permitted here: {error.stderr.strip()}")
        raise


@pytest.fixture
def hosts():
    """Namespaces by their address, and the address of the bridge, which is outside of them."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    number = random.SystemRandom().randrange(256)
    subnet, bridge = f"10.77.{number}", f"recsys{number}"
    names = [f"{bridge}{letter}" for letter in "ab"]
    with ExitStack() as undo:
        for name in names:
            ip_if_permitted("netns", "add", name)
            undo.callback(ip, "netns", "del", name)
        ip_if_permitted("link", "add", bridge, "type", "bridge")
        undo.callback(ip, "link", "del", bridge)
        ip("address", "add", f"{subnet}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for last, name in enumerate(names, 2):
            ip_if_permitted(
                "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name
            )
            # Sockets that wait for an answer would keep it for minutes.
            undo.callback(ip, "link", "del", name)
            ip("link", "set", name, "master", bridge, "up")
            ip("-n", name, "address", "add", f"{subnet}.{last}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield {f"{subnet}.{last}": name for last, name in enumerate(names, 2)}, f"{subnet}.1"


@pytest.fixture
def cluster(hosts, tmp_path):
    """URL of a master outside, which has a worker of one slot on each host."""
    (names, outside), port = hosts, "7177"
    url = f"spark://{outside}:{port}"
    master = ["--host", outside, "--port", port, "--webui-port", "0"]
    resources = ["--cores", "1", "--memory", "600m", "--work-dir", str(tmp_path / "work")]
    commands = {outside: [SPARK_CLASS, f"{DEPLOY}.master.Master", *master]}
    for host, name in names.items():
        command = [SPARK_CLASS, f"{DEPLOY}.worker.Worker", "--host", host, "--webui-port", "0"]
        commands[host] = ["ip", "netns", "exec", name, *command, *resources, url]
    with (tmp_path / "cluster.log").open("w") as log:
        started = [
            subprocess.Popen(
                command,
                env=os.environ | {"SPARK_DAEMON_MEMORY": "256m", "SPARK_LOCAL_IP": host},
                stdout=log,
                stderr=log,
            )
            for host, command in commands.items()
        ]
    yield url
    for process in started:
        process.terminate()
    for process in started:
        process.wait(30)


@pytest.fixture
def driver(hosts, cluster, config, prepared, tmp_path):
    """A process that launches `fit` on the cluster, and writes `fit.log`."""
    history = config.model.history.model_copy(update={"kind": "mean"})
    model = config.model.model_copy(update={"history": history})
    train = config.train.model_copy(update={"epochs": EPOCHS, "checkpoint_steps": 3})
    file = tmp_path / "config.json"
    changed = config.model_copy(update={"model": model, "train": train})
    file.write_text(changed.model_dump_json())
    places = [cluster, hosts[1], file, prepared.directory, tmp_path / "model"]
    with (tmp_path / "fit.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *map(str, places)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    yield process
    end_fit(process)


@pytest.mark.spark
def test_training_goes_on_without_the_host_of_the_chief(driver, tmp_path):
    """Its signs of life go on: the shared folder is still reached from there."""
    model = tmp_path / "model"
    first = Attempt(model / "launch" / "attempt-0001")
    wait_for(lambda: first.sign(0), driver, tmp_path)
    chief = worker(model, 0)
    name = ip("netns", "identify", str(chief)).strip()
    wait_for(lambda: any((model / "checkpoints").glob("*/state.json")), driver, tmp_path)
    ip("link", "set", name, "down")
    cut = time.monotonic()
    wait_for(first.is_abandoned, driver, tmp_path)
    assert time.monotonic() - cut < 90
    code, told = driver.wait(PATIENCE), (tmp_path / "fit.log").read_text()
    assert code == 0, told
    # It has read that it was given up.
    assert not command_line(chief)
    assert re.search("restart 1 in 1 s: .*stopped sending heartbeats", told)
    assert "1 of 2 workers: the cluster has no more slots" in told
    assert len(list((model / "launch").iterdir())) == 2, told
    log = (model / "launch" / "attempt-0002" / "rank-0.log").read_text()
    assert re.search(r"resume after epoch \d, step \d", log)
    assert len(TrainedModel.load(model).curves["loss"]) == EPOCHS
