"""Begin with the model of the window before, or from scratch: time and accuracy on rolling windows.

    python benchmarks/warm_start.py --data ../shared/data --runs /tmp/warm_start [--windows N]

Windows of `online_retail`, four weeks apart: half a year trains, two weeks choose the epoch, four
weeks test. Each is trained from scratch, and all but the first with the weights of the window
before, which were trained so themselves: a chain, as a nightly job makes it. The epochs of a warm
start were chosen on the validation labels of the second window, as was how new rows begin. Each
fit is a process of its own, without `train.refit`, and with one seed; its processor seconds are
told too, because a busy machine stretches the others. What is finished is read again, not repeated.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from records import Record, write
from retrieval_quality import NO_REFIT, ROOT, Run, do

from recsys.artifacts import PreparedData, TrainedModel
from recsys.config import load_config
from recsys.run_folder import RunFolder

DATA = "online_retail"
CONFIG = "benchmarks/configs/online_retail.yaml"
METRIC = "ndcg@20"
#: First day of each test window.
CUTS = (date(2011, 8, 15), date(2011, 9, 12), date(2011, 10, 10), date(2011, 11, 7))
TRAINING, VALIDATION, TEST = timedelta(weeks=26), timedelta(weeks=2), timedelta(weeks=4)
WARM = ("train.epochs=2",)


@dataclass(frozen=True)
class Window:
    """Half a year of clicks before a day, and the weeks after it.

    Attributes:
        cut: first day of the test window.
        runs: receives a run folder for each way to train; all are in one MLflow database.
    """

    cut: date
    runs: Path

    @property
    def overrides(self) -> tuple[str, ...]:
        """What makes the window of the whole table."""
        validation = self.cut - VALIDATION
        return (
            f"data.cleaning.not_before={validation - TRAINING}",
            f"data.cleaning.not_after={self.cut + TEST}",
            "data.split.validation_days=null",
            "data.split.test_days=null",
            f"data.split.validation_from={validation}",
            f"data.split.test_from={self.cut}",
            NO_REFIT,
            "evaluation.baselines=[popularity]",
        )

    def command(self, *more: str) -> str:
        """How to do it by hand."""
        return f"recsys run --config {CONFIG}" + "".join(
            f" --set {change}" for change in (*self.overrides, *more)
        )

    def scratch(self) -> Run:
        """Prepare, and train from scratch."""
        folder = self._folder("scratch")
        settings = [word for change in self.overrides for word in ("--set", change)]
        prepare = ["prepare", "--config", CONFIG, "--run-dir", folder, *settings]
        do(prepare, folder / "data")
        return _fitted(folder)

    def warm(self, before: Run) -> Run:
        """Train on the same data, beginning with the weights of an earlier run."""
        folder = self._folder("warm")
        begin = f"train.warm_start={before.folder}"
        # Refuses figures of other settings.
        RunFolder(folder).freeze(load_config(ROOT / CONFIG, [*self.overrides, *WARM, begin]))
        if not (folder / "data").exists():
            (folder / "data").symlink_to(self._folder("scratch") / "data")
        return _fitted(folder)

    def _folder(self, name: str) -> Path:
        return self.runs / f"{self.cut}-{name}"


def _fitted(folder: Path) -> Run:
    usage = do(["fit", "--run-dir", folder], folder / "model")
    return Run(folder, TrainedModel.load(folder / "model"), **usage)


def compared(window: Window, warm: Run, scratch: Run) -> Iterator[Record]:
    """Figures of one window: what a warm start reaches, and what it takes."""
    figures = {
        f"test {METRIC}": [run.tested().model[METRIC].value for run in (warm, scratch)],
        f"validation {METRIC}": [run.validation for run in (warm, scratch)],
        "fit, seconds by the clock": [run.seconds for run in (warm, scratch)],
        "fit, processor seconds": [run.processor_seconds for run in (warm, scratch)],
        "epochs": [float(len(run.model.curves[METRIC])) for run in (warm, scratch)],
    }
    for metric, (value, peer) in figures.items():
        yield Record(
            what=f"warm start, tested from {window.cut}",
            data=DATA,
            metric=metric,
            value=value,
            peer="from scratch",
            peer_value=peer,
            command=window.command(*WARM, "train.warm_start=RUN_OF_THE_WINDOW_BEFORE"),
        )


def known_items(window: Window, now: Run, before: Run) -> Record:
    """How many of the items have a row in the model of the window before."""
    items = [_items(run) for run in (now, before)]
    return Record(
        what=f"items of the window tested from {window.cut}",
        data=DATA,
        metric="share with a row to begin with",
        value=len(items[0] & items[1]) / len(items[0]),
        command=window.command(),
    )


def _items(run: Run) -> set[str]:
    data = PreparedData.load(run.folder / "data")
    file = data.directory / data.vocabularies["item_id"].path
    return set(file.read_text(encoding="utf-8").splitlines())


def main() -> None:
    """Go through the windows in their order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=len(CUTS), help="the first so many")
    arguments = parser.parse_args()
    os.environ["RECSYS_DATA"] = str(arguments.data.resolve())
    records: list[Record] = []
    before: Run | None = None
    for cut in CUTS[: arguments.windows]:
        window = Window(cut, arguments.runs.resolve())
        scratch = window.scratch()
        if before is None:
            before = scratch
            continue
        warm = window.warm(before)
        records += [*compared(window, warm, scratch), known_items(window, warm, before)]
        before = warm
        write("warm_start", records)


if __name__ == "__main__":
    main()
