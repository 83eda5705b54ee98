"""What many tests share: one Spark session, and one planted click table, prepared once."""

import csv
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

import recsys  # noqa: F401  (sets the environment that TensorFlow reads)
from recsys.artifacts import PreparedData
from recsys.cli import main
from recsys.config import RunConfig, load_config
from recsys.synthetic import Clickstream, clickstream

if TYPE_CHECKING:
    from tracking_server import TrackingServer

os.environ["PYSPARK_PYTHON"] = sys.executable
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# Short lives: compiling what runs once took the JVMs half of their processor time, and verifying
# the classes of Spark a fifth of their start. Code that is compiled less needs more stack, which the
# lineage of ALS is deep in.
os.environ["SPARK_SUBMIT_OPTS"] = (
    "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xss4m"
    " -XX:+UnlockDiagnosticVMOptions -XX:-BytecodeVerificationRemote"
)

TESTS = Path(__file__).parent
#: Files of tests that take longest, first the one that makes the run which many wait for.
LONG = (
    "end_to_end",
    "faults_distributed",
    "faults_servers",
    "cut_off_host",
    "tune",
    "retrieval",
    "fit",
    "held_out",
)
#: The command sets their levels.
LOGGERS = ("recsys", "training", "serving_export", "absl", "tensorflow", "alembic", "py4j")
Once = Callable[[str, Callable[[Path], None]], Path]
Command = Callable[..., "subprocess.CompletedProcess[str]"]

CLICKS_YAML = """
name: planted
data:
  events:
    path: clicks.csv
    format: csv
    options: {header: "true"}
    columns: {user: user, item: item, time: clicked_at}
  item_name: name
  split: {kind: time, validation_days: 3, test_days: 3}
  history_scope: session
  min_history: 1
  shards: 2
features:
  - {name: history, side: query, kind: history, of: item_id, length: 5}
  - {name: user_id, side: query, kind: id, column: user, vocabulary: {oov: 2}}
  - {name: clicked, side: context, kind: time, column: time}
  - {name: item_id, side: candidate, kind: id, column: item}
  - {name: cluster, side: candidate, kind: category, dim: 4}
  - {name: price, side: candidate, kind: number}
  - {name: title, side: candidate, kind: text, column: name, length: 4, buckets: 50, dim: 8}
model: {embedding_dim: 16, dropout: 0.1}
train: {epochs: 6, global_batch_size: 32, learning_rate: 0.02}
evaluation: {k: [1, 10, 20], bootstrap_samples: 50}
export: {index: {k: 20}, parity_queries: 64, filters: [cluster, price], availability: true}
# What follows what is planted for one step, so counting pairs of clicks is as good.
registry: {model: planted, gate: {min_lift_over_baselines: -0.05}}
scoring: {k: 5, users_per_part: 30}
cluster: {master: "local[2]", spark: {spark.sql.shuffle.partitions: "2"}}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes first, then flows: none is left to one process alone in the end."""

    def place(item: pytest.Item) -> tuple[int, bool]:
        name = item.path.stem.removeprefix("test_")
        return (LONG.index(name) if name in LONG else len(LONG)), item.path.parent != TESTS

    items.sort(key=place)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Fill a folder once for all processes of the test run; nobody may write into it after."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def planted() -> Clickstream:
    return clickstream(num_sessions=900, num_items=60, predictability=0.8, seed=1)


@pytest.fixture(scope="session")
def clicks_config(planted: Clickstream, once: Once) -> Path:
    """YAML of a run on the planted clicks; most tests read it, none may write beside it."""

    def fill(folder: Path) -> None:
        with (folder / "clicks.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["user", "item", "clicked_at", "cluster", "price", "name"])
            for user, item, at in zip(planted.user, planted.item, planted.clicked_at, strict=True):
                cluster = f"c{planted.cluster[item]}"
                name = f"item {item} of {cluster}"
                row = [f"u{user}", f"i{item}", at.strftime("%Y-%m-%d %H:%M:%S"), cluster]
                writer.writerow([*row, 10 + item % 7, name])
        (folder / "planted.yaml").write_text(CLICKS_YAML)

    return once("planted", fill) / "planted.yaml"


@pytest.fixture(scope="session")
def config(clicks_config: Path) -> RunConfig:
    return load_config(clicks_config)


@pytest.fixture(scope="session")
def save_encoder() -> "Callable[..., Path]":
    """Save a pretrained text encoder: the mean of word vectors, its words an asset beside them."""
    import tensorflow as tf

    class WordVectors(tf.Module):
        def __init__(self, file: Path, vectors: "NDArray[np.float32]") -> None:  # noqa: F821
            super().__init__()
            lookup = tf.lookup.TextFileIndex
            self._table = tf.lookup.StaticHashTable(
                tf.lookup.TextFileInitializer(
                    str(file), tf.string, lookup.WHOLE_LINE, tf.int64, lookup.LINE_NUMBER
                ),
                default_value=len(vectors),
            )
            # Unknown words share the last row; a text without words gets it too.
            self._vectors = tf.Variable(tf.pad(vectors, [[0, 1], [0, 0]], constant_values=9.0))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def __call__(self, texts: tf.Tensor) -> tf.Tensor:
            words = tf.strings.split(tf.strings.join([texts, " ."])).to_tensor(".")
            found = self._table.lookup(words)
            known = tf.cast(found < tf.shape(self._vectors, tf.int64)[0] - 1, tf.float32)
            total = tf.einsum("bl,bld->bd", known, tf.gather(self._vectors, found))
            return total / tf.maximum(tf.reduce_sum(known, axis=1, keepdims=True), 1.0)

    def save(folder: Path, words: list[str], vectors: "NDArray[np.float32]") -> Path:  # noqa: F821
        file = folder.with_suffix(".txt")
        file.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
        tf.saved_model.save(WordVectors(file, vectors), str(folder))
        file.unlink()
        return folder

    return save


@pytest.fixture(scope="session")
def spark() -> Iterator["SparkSession"]:  # noqa: F821
    from recsys.config import Cluster
    from training.session import spark_session

    settings = {"spark.sql.shuffle.partitions": "2", "spark.driver.memory": "2g"}
    session = spark_session(Cluster(master="local[2]", spark=settings), "tests")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def prepared(config: RunConfig, request: pytest.FixtureRequest, once: Once) -> PreparedData:
    """The planted clicks, prepared by the real step; treat as read-only.

    Where another process has prepared them, no JVM is started.
    """
    from training.prepare import prepare

    def fill(folder: Path) -> None:
        prepare(config, request.getfixturevalue("spark"), folder / "data")

    folder = once("prepared", fill)
    return PreparedData.load(folder / "data")


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator["TrackingServer"]:
    """A real tracking server that the test may stop and start."""
    from tracking_server import TrackingServer

    server = TrackingServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def finished_run(clicks_config: Path, once: Once) -> Path:
    """Folder of a run that went through all steps by the command; treat as read-only."""
    recsys_command = Path(sys.executable).with_name("recsys")

    def fill(folder: Path) -> None:
        arguments = ["run", "--config", clicks_config, "--run-dir", folder / "planted"]
        command = [str(word) for word in (recsys_command, *arguments)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr

    return once("runs", fill) / "planted"


@pytest.fixture(scope="session")
def command() -> Command:
    """Give the `recsys` command its words in this process: nothing is imported or started anew.

    Its answer is that of a process, but what it logs is in `caplog`.
    """

    def answer(*words: object) -> subprocess.CompletedProcess[str]:
        told, complained, code = io.StringIO(), io.StringIO(), 0
        arguments = ["recsys", *map(str, words)]
        levels = {name: logging.getLogger(name).level for name in LOGGERS}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            for name, value in (("LOGGING_LEVEL", "ERROR"), ("ENABLE_ARTIFACTS_PROGRESS_BAR", "0")):
                patch.setenv(f"MLFLOW_{name}", value)
            try:
                with redirect_stdout(told), redirect_stderr(complained):
                    main()
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                for name, level in levels.items():
                    logging.getLogger(name).setLevel(level)
        return subprocess.CompletedProcess(arguments, code, told.getvalue(), complained.getvalue())

    return answer
