"""Random faults in a training on Spark: does it end, what is repeated, how good is it.

    python benchmarks/faults.py --runs /tmp/faults --kills 50 --longest 45

Trainings on two workers of two executors are disturbed until so many faults have been injected: a
worker, the chief or an executor's JVM is killed (SIGKILL) or frozen (SIGSTOP) at a random moment
while both workers live. Their final metric stands beside that of undisturbed seeds in one process.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from records import Record, write

from recsys.artifacts import TrainedModel
from recsys.config import Cluster, RunConfig

RECSYS = str(Path(sys.executable).with_name("recsys"))
COMMAND = "python benchmarks/faults.py --runs /tmp/faults --kills 50 --longest 45"
SPARK = {"spark.driver.memory": "1g", "spark.network.timeout": "60s"}
DEATHS = (signal.SIGKILL, signal.SIGSTOP)
VICTIMS = ("worker", "chief", "executor")
EVERY_STEPS = 50


@dataclass
class Outcome:
    """One disturbed training."""

    completed: bool
    value: float
    repeated: int
    faults: list[str] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)


def prepared(config: str, overrides: list[str], runs: Path) -> RunConfig:
    """Prepare the data once; later calls find them."""
    base = runs / "base"
    if not (base / "data" / "manifest.json").is_file():
        changes = [word for change in overrides for word in ("--set", change)]
        command = [RECSYS, "prepare", "--config", config, *changes, "--run-dir", str(base)]
        subprocess.run(command, check=True)
    return RunConfig.model_validate_json((base / "config.json").read_bytes())


def folder_of(runs: Path, name: str, config: RunConfig) -> Path:
    """Make a run folder with a config of its own beside the prepared data."""
    folder = runs / name
    if not folder.exists():
        folder.mkdir()
        (folder / "data").symlink_to((runs / "base" / "data").resolve())
        (folder / "config.json").write_text(config.model_dump_json())
    return folder


def undisturbed(config: RunConfig, runs: Path, seeds: range) -> list[float]:
    """Best value of the monitored metric by seed."""
    values = []
    for seed in seeds:
        folder = folder_of(runs, f"seed-{seed}", config.model_copy(update={"seed": seed}))
        if not TrainedModel.exists(folder / "model"):
            subprocess.run([RECSYS, "fit", "--run-dir", str(folder)], check=True)
        values.append(best(folder))
    return values


def best(folder: Path) -> float:
    """Value of the monitored metric at the best epoch."""
    model = TrainedModel.load(folder / "model")
    return model.curves[model.monitor][model.best_epoch - 1]


def disturbed(folder: Path, faults: int, longest: float, draw: random.Random) -> Outcome:
    """Train with so many faults, or fewer if the training is over before.

    A fault comes up to `longest` seconds after both workers live; their start is among them.
    """
    outcome = Outcome(completed=False, value=float("nan"), repeated=0)
    model = folder / "model"
    with (folder / "fit.log").open("w") as log:
        process = subprocess.Popen(
            [RECSYS, "fit", "--run-dir", str(folder)], stdout=log, stderr=log
        )
        for number in range(1, faults + 1):
            attempt = wait_for_workers(process, model / "launch", number)
            if attempt is None:
                break
            time.sleep(draw.uniform(0, longest))
            what, death = draw.choice(VICTIMS), draw.choice(DEATHS)
            pid = victim(attempt, what)
            if pid is None or process.poll() is not None:
                break
            outcome.lost += steps_since_checkpoint(model / "checkpoints")
            os.kill(pid, death)
            outcome.faults.append(f"{what} {death.name}")
            print(f"{folder.name}: {outcome.faults[-1]}", flush=True)
        outcome.completed = process.wait() == 0
    outcome.value = best(folder) if outcome.completed else outcome.value
    outcome.repeated = repeated_epochs(model / "launch")
    return outcome


def wait_for_workers(process: subprocess.Popen[bytes], launch: Path, number: int) -> Path | None:
    """Folder of the so many-th attempt once both of its workers give signs of life."""
    attempt = launch / f"attempt-{number:04d}"
    while process.poll() is None:
        if all((attempt / f"rank-{rank}.alive").is_file() for rank in range(2)):
            return attempt
        time.sleep(0.1)
    return None


def victim(attempt: Path, what: str) -> int | None:
    """Process id of a worker of this attempt, or of the executor that it belongs to."""
    rank = "0" if what == "chief" else "1"
    for pid, words in processes():
        if "training.worker" in words and words[-3:-1] == [str(attempt), rank]:
            return pid if what != "executor" else executor_of(pid)
    return None


def executor_of(pid: int) -> int | None:
    """The JVM among the parents of a process."""
    while pid > 1:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if any("CoarseGrainedExecutorBackend" in word for word in words):
            return pid
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return None


def processes() -> Iterator[tuple[int, list[str]]]:
    """Process ids and command lines."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            yield int(path.name), (path / "cmdline").read_bytes().decode().split("\0")[:-1]
        except OSError:
            continue


def steps_since_checkpoint(checkpoints: Path) -> list[float]:
    """Steps since the newest checkpoint, by the pace before it; none while the pace is unknown.

    No more than there are between two checkpoints: then the workers were still starting.
    """
    times = sorted(file.stat().st_mtime for file in checkpoints.glob("epoch-*/state.json"))
    if len(times) < 2:
        return []
    pace = EVERY_STEPS / max(times[-1] - times[-2], 1e-3)
    return [min((time.time() - times[-1]) * pace, float(EVERY_STEPS))]


def repeated_epochs(launch: Path) -> int:
    """Epochs that chiefs have finished more than once, checkpoint included."""
    logs = [file.read_text() for file in launch.glob("attempt-*/rank-0.log")]
    finished = [n for told in logs for n in re.findall(r" epoch (\d+): loss", told)]
    return len(finished) - len(set(finished))


def records(outcomes: list[Outcome], seeds: list[float], config: RunConfig) -> list[Record]:
    """Figures of all trainings."""
    kinds = sorted({fault for outcome in outcomes for fault in outcome.faults})
    faults = sum(len(outcome.faults) for outcome in outcomes)
    what = f"{faults} faults in {len(outcomes)} trainings of {config.train.epochs} epochs"
    told = f"undisturbed, seeds {min(seeds):.4f} to {max(seeds):.4f}"
    lost = [steps for outcome in outcomes for steps in outcome.lost]
    estimate = f"by pace, {EVERY_STEPS} at most by the distance of checkpoints"
    values = [outcome.value for outcome in outcomes if outcome.completed]
    middle = sum(seeds) / len(seeds)
    worst = max(values, key=lambda value: abs(value - middle), default=float("nan"))
    by_seed = [outcomes[n :: len(seeds)] for n in range(len(seeds))]
    differ = sum(max(0, len({o.value for o in some if o.completed}) - 1) for some in by_seed)

    def record(metric: str, value: float, target: str = "", peer: float | None = None) -> Record:
        peer_name = told if peer is not None else ""
        return Record(
            what, config.name, metric, value, COMMAND, peer_name, peer_value=peer, target=target
        )

    return [
        record("trainings completed", sum(o.completed for o in outcomes), f"{len(outcomes)}"),
        record("finished epochs repeated", sum(o.repeated for o in outcomes), "0"),
        record(f"steps lost at a fault, mean ({estimate})", sum(lost) / max(1, len(lost))),
        record(f"{config.train.monitor}, farthest from the seeds' mean", worst, "", middle),
        record("further values among those of one seed", differ, "0"),
        *(record(kind, sum(outcome.faults.count(kind) for outcome in outcomes)) for kind in kinds),
    ]


def main() -> None:
    """Disturb trainings until all faults are injected; print and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kills-per-training", type=int, default=5)
    parser.add_argument("--longest", type=float, default=60, help="seconds until the next fault")
    parser.add_argument("--config", default="eshop_clothing")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    steps = f"train.checkpoint_steps={EVERY_STEPS}"
    config = prepared(given.config, ["train.refit=false", steps, *given.overrides], given.runs)
    seeds = undisturbed(config, given.runs, range(1, given.seeds + 1))
    cluster = Cluster(
        kind="spark",
        master="local-cluster[2,1,1024]",
        restart_seconds=1,
        heartbeat_timeout_seconds=20,
        spark=SPARK,
    )
    draw, outcomes, left = random.Random(1), list[Outcome](), given.kills
    while left > 0:
        own = config.model_copy(
            update={"cluster": cluster, "seed": 1 + len(outcomes) % given.seeds}
        )
        folder = given.runs / f"disturbed-{len(outcomes)}"
        shutil.rmtree(folder, ignore_errors=True)
        folder_of(given.runs, folder.name, own)
        faults = min(left, given.kills_per_training)
        outcomes.append(disturbed(folder, faults, given.longest, draw))
        if not outcomes[-1].faults:
            raise SystemExit("a training was over before the first fault: give it more epochs")
        left -= len(outcomes[-1].faults)
        print(outcomes[-1], flush=True)
        write("faults", records(outcomes, seeds, config))


if __name__ == "__main__":
    main()
