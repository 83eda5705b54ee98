"""A host is cut off in the middle of a training: two network namespaces, joined by a bridge.

    recsys prepare --config benchmarks/configs/eshop_clothing.yaml --run-dir RUN
    python benchmarks/cut_off.py RUN

Needs root on Linux. A Spark standalone master and the driver run outside, a worker of Spark in each
namespace; `recsys fit` trains on both with `min_workers: 1`. After the first checkpoint one's link
goes down, without a word to anybody, and stays down. The folder of the run is still reached from
there, as if storage had a network of its own, so signs of life go on: that the host is gone is for
TensorFlow and Spark to find out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pyspark
from records import Record, write

from recsys.artifacts import TrainedModel
from recsys.config import Cluster, RunConfig

SPARK_CLASS = Path(pyspark.__file__).parent / "bin" / "spark-class"
DEPLOY = "org.apache.spark.deploy"
RECSYS = str(Path(sys.executable).with_name("recsys"))
OUTSIDE, HOSTS, PORT = "10.77.0.1", ("10.77.0.2", "10.77.0.3"), "7177"
BRIDGE, NAMES = "recsys-br", ("recsys-a", "recsys-b")
EPOCHS, EVERY_STEPS = 3, 20
#: By default Spark takes two minutes to miss an executor that says nothing.
SETTINGS = {
    "spark.driver.host": OUTSIDE,
    "spark.driver.bindAddress": OUTSIDE,
    "spark.driver.memory": "512m",
    "spark.executor.memory": "512m",
    "spark.ui.enabled": "false",
    "spark.network.timeout": "20s",
    "spark.network.timeoutInterval": "5s",
    "spark.executor.heartbeatInterval": "4s",
}
LONGEST = 900.0


def ip(*words: str) -> None:
    """Call iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def network() -> Iterator[None]:
    """Two namespaces with an address each, and a bridge to the outside."""
    with ExitStack() as undo:
        ip("link", "add", BRIDGE, "type", "bridge")
        undo.callback(ip, "link", "del", BRIDGE)
        ip("address", "add", f"{OUTSIDE}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for name, address in zip(NAMES, HOSTS, strict=True):
            ip("netns", "add", name)
            # Its end of the link goes with it, and so does the other.
            undo.callback(ip, "netns", "del", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", name, "master", BRIDGE, "up")
            inside = ("-n", name)
            ip(*inside, "address", "add", f"{address}/24", "dev", "eth0")
            ip(*inside, "link", "set", "eth0", "up")
            ip(*inside, "link", "set", "lo", "up")
        yield


@contextmanager
def spark_cluster(folder: Path) -> Iterator[str]:
    """URL of a master outside, with a worker of one slot in each namespace."""
    url = f"spark://{OUTSIDE}:{PORT}"
    work = ["--cores", "1", "--memory", "600m", "--work-dir", str(folder), "--webui-port", "0"]
    master = [f"{DEPLOY}.master.Master", "--host", OUTSIDE, "--port", PORT, "--webui-port", "0"]
    commands: list[Sequence[str | Path]] = [[SPARK_CLASS, *master]]
    for name, host in zip(NAMES, HOSTS, strict=True):
        worker = [f"{DEPLOY}.worker.Worker", "--host", host, *work, url]
        commands.append(["ip", "netns", "exec", name, SPARK_CLASS, *worker])
    environment = os.environ | {
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_MASTER_OPTS": "-Dspark.worker.timeout=20",
        "PYSPARK_PYTHON": sys.executable,
    }
    with (folder / "cluster.log").open("w") as log:
        started = [
            subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            for command in commands
        ]
        try:
            yield url
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait(60)


def trained(run: Path, folder: Path, url: str) -> dict[str, float]:
    """Train, cut one host off, and wait for the end; seconds of what was seen."""
    config = RunConfig.model_validate_json((run / "config.json").read_bytes())
    changes = {"epochs": EPOCHS, "checkpoint_steps": EVERY_STEPS, "refit": False}
    cluster = Cluster(kind="spark", master=url, workers=2, min_workers=1, spark=SETTINGS)
    train = config.train.model_copy(update=changes)
    changed = config.model_copy(update={"train": train, "cluster": cluster})
    (folder / "config.json").write_text(changed.model_dump_json())
    (folder / "data").symlink_to((run / "data").resolve())
    log = folder / "fit.log"
    environment = os.environ | {"PYSPARK_PYTHON": sys.executable}
    with log.open("w") as stream:
        command = [RECSYS, "fit", "--run-dir", str(folder)]
        fit = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    try:
        wait_for(lambda: any((folder / "model/checkpoints").glob("*/state.json")), fit, log)
        ip("link", "set", NAMES[1], "down")
        cut = time.monotonic()
        wait_for(lambda: "W restart 1 in" in log.read_text(), fit, log)
        noticed = time.monotonic() - cut
        wait_for(lambda: "1 workers start" in log.read_text(), fit, log)
        resumed = time.monotonic() - cut
        fit.wait(LONGEST)
    finally:
        fit.kill()
        fit.wait()
    print(log.read_text())
    epochs = len(TrainedModel.load(folder / "model").curves["loss"])
    return {"noticed": noticed, "resumed": resumed, "epochs": float(epochs)}


def wait_for(condition: object, fit: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until it holds while the training runs."""
    deadline = time.monotonic() + LONGEST
    while not condition():  # type: ignore[operator]
        if fit.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the training has ended, or takes too long:\n{log.read_text()}")
        time.sleep(0.5)


def main() -> None:
    """Train on two hosts and lose one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run that was prepared")
    run = parser.parse_args().run.absolute()
    with TemporaryDirectory() as folder, network(), spark_cluster(Path(folder)) as url:
        seen = trained(run, Path(folder), url)
    record = {"data": run.name, "command": f"python benchmarks/cut_off.py {run.name}"}
    told = {
        "noticed": "from the cut until the attempt is given up",
        "resumed": "from the cut until one worker goes on",
    }
    rows = [Record(what=what, metric="s", value=seen[key], **record) for key, what in told.items()]
    what = f"epochs finished, of {EPOCHS}"
    write("cut_off", [*rows, Record(what=what, metric="epochs", value=seen["epochs"], **record)])


if __name__ == "__main__":
    main()
