"""Two stages beside retrieval alone, on the same candidates of a public data set.

    python benchmarks/ranking.py --data ../shared/data --runs /tmp/ranking [--variants NAME ...]
    python benchmarks/ranking.py --data ../shared/data --runs /tmp/multi --multitask mmoe ple --test

The data are prepared and the towers fitted once. Each variant of the ranker is trained by `recsys
rank` in a process of its own. The test split is read by the tuned settings and by the same on plain
towers, once each, by `recsys evaluate`: that shows how much of the lift a retrieval that scores
what was seen has already. Ablations are compared on what the rankers hold out of the validation
window, where the settings were chosen. What is finished is read again, not repeated.

With `--multitask` rankers of several tasks stand beside a ranker for each of the tasks: that of the
config with all weights but one set to 0, so of the same size, on the same lists.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import tensorflow as tf
from records import Record, replace
from retrieval_quality import ROOT, do

from recsys.artifacts import EvaluationReport, TrainedRanker
from recsys.config import load_config
from recsys.run_folder import RunFolder

DATA = "taobao"
CONFIG = "benchmarks/configs/taobao_two_stage.yaml"
TUNED = "tuned"
#: Towers as they are commonly built: what was seen has no score of its own (`RepeatScores`).
PLAIN, PLAIN_TOWERS = "plain towers", ("model.history.repeats=false",)
#: Retrieval alone is the rival here; the counting baselines stand in end_to_end.md.
FEW = "evaluation.baselines=[popularity]"
VARIANTS: dict[str, tuple[str, ...]] = {
    "pointwise log loss": ("ranking.loss=pointwise",),
    "cross layers of rank 8": ("ranking.cross_rank=8",),
    "no cross layers": ("ranking.cross_layers=0",),
    "dropout 0.1": ("ranking.dropout=0.1",),
}


MULTITASK = "benchmarks/configs/taobao_multitask.yaml"
TASKS = ("buy", "cart", "fav")
#: The first is that of the config, and the one whose test figures are read.
KINDS: dict[str, tuple[str, ...]] = {
    "mmoe": (),
    "shared bottom": ("ranking.multitask.kind=shared_bottom",),
    "ple": ("ranking.multitask.kind=ple",),
    "mmoe, learned weights": ("ranking.multitask.weights=learned",),
}


def variant(
    runs: Path, name: str, *overrides: str, config: str = CONFIG, towers: Sequence[str] = ()
) -> Path:
    """Train a ranker with these overrides on data and towers of all; return its run folder.

    Towers with overrides of their own are a base of their own.
    """
    base = runs / ("base" if not towers else f"base-of-{name}".replace(" ", "-"))
    folder = runs / name.replace(" ", "-").replace(",", "")
    sets = [word for override in towers for word in ("--set", override)]
    do(["prepare", "--config", config, *sets, "--run-dir", base], base / "data")
    do(["fit", "--run-dir", base], base / "model")
    # Refuses figures of other settings.
    RunFolder(folder).freeze(load_config(ROOT / config, [FEW, *towers, *overrides]))
    for step in ("data", "model"):
        if not (folder / step).exists():
            (folder / step).symlink_to(base / step)
    do(["rank", "--run-dir", folder], folder / "ranking")
    return folder


def tested(folder: Path, name: str, *overrides: str) -> Iterator[Record]:
    """Figures of the test window: both stages beside the first alone."""
    do(["evaluate", "--run-dir", folder], folder / "evaluation")
    report = EvaluationReport.load(folder / "evaluation")
    settings = "".join(f" --set {override}" for override in overrides)
    record = partial(Record, data=DATA, command=f"recsys run --config {CONFIG}{settings}")
    for metric in ("ndcg@10", "mrr@10", "recall@10"):
        lift = report.lifts["retrieval"][metric]
        yield record(
            what=f"{name}: test, lift {lift.low:+.1%} to {lift.high:+.1%}",
            metric=metric,
            value=report.model[metric].value,
            peer="retrieval alone, same candidates",
            peer_value=report.baselines["retrieval"][metric].value,
            target="ratio at least 1.15" if metric == "ndcg@10" else "",
        )
    both, first = report.impressions["model"], report.impressions["retrieval"]
    for metric in ("auc", "user_auc", "request_auc", "ndcg@10", "mrr"):
        yield record(
            what=f"{name}: test, of the ranked candidates",
            metric=metric,
            value=both[metric],
            peer="retrieval alone, same candidates",
            peer_value=first[metric],
        )
    for metric in ("log_loss", "calibration_error"):
        what = f"{name}: test, of the ranked candidates"
        yield record(what=what, metric=metric, value=both[metric])


def held_out(folder: Path) -> Iterator[Record]:
    """Calibration before and after, on what is held out."""
    ranker = TrainedRanker.load(folder / "ranking")
    for metric in ("calibration_error", "log_loss"):
        yield Record(
            data=DATA,
            what="tuned: held out, calibrated",
            metric=metric,
            value=ranker.held_out["ranker"][metric],
            peer="uncalibrated",
            peer_value=ranker.held_out["uncalibrated"][metric],
            command=f"recsys run --config {CONFIG}",
        )


def ablation(runs: Path, tuned: Path, name: str) -> Iterator[Record]:
    """A variant beside the tuned settings, on what is held out."""
    overrides = VARIANTS[name]
    other = TrainedRanker.load(variant(runs, name, *overrides) / "ranking").held_out["ranker"]
    whole = TrainedRanker.load(tuned / "ranking").held_out["ranker"]
    for metric in ("ndcg@10", "user_auc"):
        yield Record(
            data=DATA,
            what=f"ablation: {name}, held out",
            metric=metric,
            value=other[metric],
            peer=TUNED,
            peer_value=whole[metric],
            command=f"recsys run --config {CONFIG} --set {' --set '.join(overrides)}",
        )


def multitask(runs: Path, kinds: Sequence[str]) -> Iterator[Record]:
    """Rankers of several tasks beside those of one, on what the rankers hold out."""
    alone = {
        task: variant(runs, f"{task} alone", *_alone(task), config=MULTITASK) for task in TASKS
    }
    peers = {task: TrainedRanker.load(folder / "ranking") for task, folder in alone.items()}
    for kind in kinds:
        folder = variant(runs, kind, *KINDS[kind], config=MULTITASK)
        together = TrainedRanker.load(folder / "ranking")
        for task, peer in peers.items():
            what = f"multitask, {kind} ({_weights(together):,} weights): {task}, held out"
            figures = together.tasks[task], peer.tasks[task]
            yield from _beside(what, *figures, _weights(peer), KINDS[kind])


def tested_tasks(runs: Path) -> Iterator[Record]:
    """Figures of the test window of the config as it is, beside those of one task."""
    folders = {name: runs / f"{name} alone".replace(" ", "-") for name in TASKS}
    together = runs / next(iter(KINDS))
    for folder in (together, *folders.values()):
        do(["evaluate", "--run-dir", folder], folder / "evaluation")
    found = EvaluationReport.load(together / "evaluation").tasks
    for task, folder in folders.items():
        peer = EvaluationReport.load(folder / "evaluation").tasks[task]
        weights = _weights(TrainedRanker.load(folder / "ranking"))
        yield from _beside(f"multitask, mmoe: {task}, test", found[task], peer, weights, ())


def _alone(task: str) -> tuple[str, ...]:
    return tuple(f"ranking.tasks.{other}=0" for other in TASKS if other != task)


def _beside(
    what: str,
    figures: Mapping[str, float],
    peer: Mapping[str, float],
    peer_weights: int,
    overrides: Sequence[str],
) -> Iterator[Record]:
    settings = "".join(f" --set {override}" for override in overrides)
    for metric in ("auc", "user_auc", "log_loss"):
        yield Record(
            data=DATA,
            what=f"{what}, {figures['positives']:.0f} positives",
            metric=metric,
            value=figures[metric],
            peer=f"mmoe of this task alone ({peer_weights:,} weights)",
            peer_value=peer[metric],
            command=f"recsys run --config {MULTITASK}{settings}",
            target="no task below .99, one above 1" if metric == "auc" else "",
        )


def _weights(ranker: TrainedRanker) -> int:
    """Trained numbers of a ranker."""
    stored = tf.train.list_variables(str(ranker.directory / ranker.ranker / "variables/variables"))
    return sum(math.prod(shape) for name, shape in stored if name.startswith("_network/"))


def main() -> None:
    """Do the tuned settings and the chosen variants; keep the records of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--multitask", nargs="+", choices=KINDS, help="several tasks by these kinds, nothing else"
    )
    parser.add_argument("--test", action="store_true", help="of several tasks on the test window")
    arguments = parser.parse_args()
    os.environ["RECSYS_DATA"] = str(arguments.data.resolve())
    runs = arguments.runs.resolve()
    if arguments.multitask:
        rows = list(multitask(runs, arguments.multitask))
        rows += tested_tasks(runs) if arguments.test else []
        replace("ranking", rows, _of_tasks)
        return
    tuned = variant(runs, TUNED)
    plain = variant(runs, PLAIN, towers=PLAIN_TOWERS)
    records = [*tested(tuned, TUNED), *tested(plain, PLAIN, *PLAIN_TOWERS), *held_out(tuned)]
    for name in arguments.variants:
        records += ablation(runs, tuned, name)
    replace("ranking", records, partial(_is_stale, arguments.variants))


def _is_stale(variants: Sequence[str], row: dict[str, object]) -> bool:
    what = str(row["what"])
    if _of_tasks(row) or row["data"] != DATA:
        return False
    return not what.startswith("ablation") or any(f": {name}," in what for name in variants)


def _of_tasks(row: dict[str, object]) -> bool:
    return str(row["what"]).startswith("multitask")


if __name__ == "__main__":
    main()
