"""Accuracy of retrieval on public protocols: seeds, defaults, ablations, counting baselines.

    python benchmarks/retrieval_quality.py --data ../shared/data --runs /tmp/quality [STUDY ...]

Each data set is prepared once; each variant and seed is fitted by `recsys fit` in a process of its
own. The test split is read by the tuned settings, by the package's defaults and where cold items
are compared, once each, by `recsys evaluate` over the whole corpus. Ablations are compared on the
validation split, where the settings were chosen. What is finished is read again, not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from records import Record, replace

from recsys.artifacts import EvaluationReport, TrainedModel
from recsys.config import RunConfig, load_config
from recsys.model_config import Train, TwoTowerConfig
from recsys.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
RECSYS = Path(sys.executable).with_name("recsys")
#: Ablations learn from training labels alone: the validation labels compare them.
NO_REFIT = "train.refit=false"
MakeRecord = Callable[..., Record]
#: What the rows of a study begin with.
PARTS = ("tuned", "defaults", "ablation", "cold")


@dataclass(frozen=True)
class Study:
    """One data set and protocol.

    Attributes:
        config: the tuned settings.
        peers: by metric, whom to beat, with which value, and the target.
        seeds: how many, from 1.
        variants: overrides by name, compared on validation.
        cold: overrides whose test figures are compared on cold items.
    """

    config: str
    peers: dict[str, tuple[str, float, float]]
    seeds: int = 3
    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)
    cold: tuple[str, ...] = ()


KINDS = ("mean", "lstm", "attention")
ENCODERS = {f"encoder {kind}": (f"model.history.kind={kind}",) for kind in KINDS}
SAMPLED = "model.loss.full_softmax_up_to=0"
#: Of the loss and of training, where the tuned settings have none of them; a seed for the noise.
DETAILS: dict[str, tuple[str, ...]] = {
    "another seed": ("seed=2",),
    "dot product": ("model.loss.normalize=false", "model.loss.temperature=1.0"),
    "labels smoothed by 0.1": ("model.loss.label_smoothing=0.1",),
    "warm-up of 200 steps": ("train.warmup_steps=200",),
    "gradients clipped at 1": ("train.clip_norm=1.0",),
    "weight decay 0.01": ("train.weight_decay=0.01",),
    "embeddings not shared": ("model.share_item_embeddings=false",),
}
STUDIES = {
    "amazon_beauty": Study(
        "benchmarks/configs/amazon_beauty.yaml",
        {"recall@10": ("eSASRec", 0.0928, 0.095), "ndcg@10": ("SASRec+SS", 0.0531, 0.055)},
        variants=ENCODERS
        | {
            "labels of the batch as negatives": (SAMPLED, "model.loss.num_uniform_negatives=0"),
            "and 1024 uniform ones": (SAMPLED, "model.loss.num_uniform_negatives=1024"),
            "1024 uniform ones alone": (
                SAMPLED,
                "model.loss.num_uniform_negatives=1024",
                "model.loss.in_batch_negatives=false",
            ),
            "loss in float32": ("model.loss.half_precision=false",),
            "dropout 0.2": ("model.dropout=0.2",),
            "pools weigh events by what they are": ("model.history.salience=true",),
            "constant learning rate": ("train.schedule=constant",),
        }
        | DETAILS,
    ),
    "amazon_beauty_attributes": Study(
        "benchmarks/configs/amazon_beauty_attributes.yaml",
        {"recall@10": ("prototype", 0.0956, 0.105), "ndcg@10": ("prototype", 0.0559, 0.062)},
    ),
    "diginetica": Study(
        "benchmarks/configs/diginetica.yaml",
        {"recall@20": ("GCE-GNN", 0.5422, 0.550), "mrr@20": ("GCE-GNN", 0.1904, 0.195)},
        variants={
            "no neighbours": ("model.num_neighbours=0",),
            "no score for seen items": ("model.history.repeats=false",),
            "labels count alike, however old": ("model.loss.recency_half_life_days=null",),
        },
    ),
    "eshop_clothing": Study(
        "training/configs/eshop_clothing.yaml",
        {"recall@20": ("Markov", 0.7044, 0.75), "mrr@20": ("Markov", 0.2578, 0.29)},
        variants=ENCODERS
        | {
            "no score for seen items": ("model.history.repeats=false",),
            "dropout 0": ("model.dropout=0",),
            "dropout 0.5": ("model.dropout=0.5",),
            "pools weigh events by recency alone": ("model.history.salience=false",),
            "constant learning rate": ("train.schedule=constant",),
        }
        | DETAILS,
    ),
    "taobao": Study(
        "benchmarks/configs/taobao.yaml",
        # The rows by baseline have `last_viewed` too, which is harder to beat (.1620).
        {"ndcg@20": ("best of popularity, Markov, co-visitation, ALS", 0.0542, 0.0650)},
        variants={
            "encoder gru": ("model.history.kind=gru",),
            "encoder attention": ("model.history.kind=attention",),
            "no score for seen items": ("model.history.repeats=false",),
            "labels of the batch alone as negatives": ("model.loss.num_uniform_negatives=0",),
            "4096 uniform negatives alone": ("model.loss.in_batch_negatives=false",),
            "labels of the batch, 2048 uniform, 2048 by popularity": (
                "model.loss.num_uniform_negatives=2048",
                "model.loss.num_popular_negatives=2048",
            ),
            "all items as negatives": ("model.loss.full_softmax_up_to=50000",),
            "dropout 0.2": ("model.dropout=0.2",),
            "dropout of candidates 0": ("model.candidate_dropout=0",),
            "pools weigh events by recency alone": ("model.history.salience=false",),
            "cosine learning rate": ("train.schedule=cosine",),
        }
        | DETAILS,
    ),
    "online_retail": Study(
        "benchmarks/configs/online_retail.yaml",
        {"ndcg@20": ("best counting baseline", 0.0487, 0.0487)},
        seeds=1,
        cold=("model.id_dropout=0.2",),
    ),
}


@dataclass(frozen=True)
class Run:
    """A finished fit, with what it took."""

    folder: Path
    model: TrainedModel
    seconds: float
    gib: float
    processor_seconds: float = 0.0

    @property
    def validation(self) -> float:
        """The monitored metric of the best epoch."""
        return max(self.model.curves[self.model.monitor])

    def tested(self) -> EvaluationReport:
        """Evaluate on the test split, over the whole corpus."""
        do(["evaluate", "--run-dir", self.folder], self.folder / "evaluation")
        return EvaluationReport.load(self.folder / "evaluation")


class Runs:
    """The runs of one study: all read what was prepared once."""

    def __init__(self, study: Study, folder: Path) -> None:
        self._config = ROOT / study.config
        self._folder = folder
        prepare = ["prepare", "--config", study.config, "--run-dir", folder / "prepared"]
        do(prepare, folder / "prepared" / "data")

    def fit(self, label: str, *overrides: str, all_baselines: bool = False) -> Run:
        """Fit the study's settings with these overrides, in a folder of this name."""
        few = () if all_baselines else ("evaluation.baselines=[popularity]",)
        return self._fit(label, load_config(self._config, [*overrides, *few]))

    def defaults(self) -> Run:
        """Fit what the package does where a config says nothing of model and train."""
        config = load_config(self._config, ["seed=1", "evaluation.baselines=[popularity]"])
        train = Train(monitor=config.train.monitor, refit=config.train.refit)
        changes = {"model": TwoTowerConfig(), "train": train}
        return self._fit("defaults", config.model_copy(update=changes))

    def _fit(self, label: str, config: RunConfig) -> Run:
        folder = self._folder / label.replace(" ", "-")
        # Refuses figures of other settings.
        RunFolder(folder).freeze(config)
        if not (folder / "data").exists():
            (folder / "data").symlink_to(self._folder / "prepared" / "data")
        usage = do(["fit", "--run-dir", folder], folder / "model")
        return Run(folder, TrainedModel.load(folder / "model"), **usage)


def do(arguments: Sequence[str | Path], directory: Path) -> dict[str, float]:
    """Run a step unless it is finished; returns its seconds and peak GiB, kept beside it."""
    kept = directory.with_name(f"{directory.name}.usage.json")
    if not (directory / "manifest.json").is_file():
        begun = time.monotonic()
        process = subprocess.Popen([RECSYS, *arguments], cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            raise SystemExit(f"recsys {arguments[0]} ended with {code}")
        spent = {
            "seconds": time.monotonic() - begun,
            "gib": usage.ru_maxrss / 2**20,
            "processor_seconds": usage.ru_utime + usage.ru_stime,
        }
        kept.write_text(json.dumps(spent))
    usage_of_step: dict[str, float] = json.loads(kept.read_text())
    return usage_of_step


def study(name: str, runs: Path, parts: Sequence[str], seeds: int | None) -> Iterator[Record]:
    """Figures of one study: tuned by seed and beside baselines, defaults, ablations, cold items."""
    chosen = STUDIES[name]
    made = Runs(chosen, runs / name)
    record = partial(Record, data=name)
    tuned = [
        made.fit(f"seed {seed}", f"seed={seed}", all_baselines=seed == 1)
        for seed in range(1, (seeds or chosen.seeds) + 1)
    ]
    reports = [run.tested() for run in tuned]
    if "tuned" in parts:
        yield from _means(chosen, tuned, reports, record)
        yield from _beside_baselines(chosen, reports[0], record)
    if "defaults" in parts:
        yield from _defaults(chosen, made.defaults(), reports[0], record)
    if "ablation" in parts:
        yield from _ablations(chosen, made, record)
    if "cold" in parts and chosen.cold:
        yield from _cold(chosen, made.fit("cold", "seed=1", *chosen.cold), reports[0], record)


def _command(chosen: Study, *overrides: str) -> str:
    changed = "".join(f" --set {override}" for override in overrides)
    return f"recsys run --config {chosen.config}{changed}"


def _means(
    chosen: Study, runs: Sequence[Run], reports: Sequence[EvaluationReport], record: MakeRecord
) -> Iterator[Record]:
    command = _command(chosen, "seed=1")
    seeds = "seed 1"
    if len(runs) > 1:
        command, seeds = f"{command}, and so on to {len(runs)}", f"mean of {len(runs)} seeds"
    for metric, (peer, value, target) in chosen.peers.items():
        figures = [report.model[metric].value for report in reports]
        spread = f", standard deviation {stdev(figures):.4f}" if len(figures) > 1 else ""
        yield record(
            what=f"tuned: test, {seeds}{spread}",
            metric=metric,
            value=mean(figures),
            peer=peer,
            peer_value=value,
            target=f"at least {target}",
            command=command,
        )
    spent = {"seconds": mean(run.seconds for run in runs), "peak GiB": max(run.gib for run in runs)}
    for metric, value in spent.items():
        yield record("tuned: fit", metric=metric, value=value, command=command)


def _beside_baselines(
    chosen: Study, report: EvaluationReport, record: MakeRecord
) -> Iterator[Record]:
    for metric in chosen.peers:
        for baseline, values in report.baselines.items():
            yield record(
                what="tuned: test, seed 1",
                metric=metric,
                value=report.model[metric].value,
                peer=baseline,
                peer_value=values[metric].value,
                target="above",
                command=_command(chosen, "seed=1"),
            )


def _defaults(
    chosen: Study, run: Run, tuned: EvaluationReport, record: MakeRecord
) -> Iterator[Record]:
    report = run.tested()
    for metric in chosen.peers:
        yield record(
            what="defaults: test, seed 1",
            metric=metric,
            value=report.model[metric].value,
            peer="tuned, seed 1",
            peer_value=tuned.model[metric].value,
            target="ratio at least 0.95",
            command=f"{_command(chosen, 'seed=1')}, sections model and train left out",
        )


def _ablations(chosen: Study, made: Runs, record: MakeRecord) -> Iterator[Record]:
    if not chosen.variants:
        return
    whole = made.fit("ablation of nothing", "seed=1", NO_REFIT)
    for label, overrides in chosen.variants.items():
        run = made.fit(label, "seed=1", NO_REFIT, *overrides)
        yield record(
            what=f"ablation: {label}",
            metric=f"validation {run.model.monitor}",
            value=run.validation,
            peer="tuned, seed 1",
            peer_value=whole.validation,
            command=_command(chosen, "seed=1", NO_REFIT, *overrides),
        )


def _cold(chosen: Study, run: Run, tuned: EvaluationReport, record: MakeRecord) -> Iterator[Record]:
    report = run.tested()
    for bucket, before in tuned.slices["item_popularity"].items():
        after = report.slices["item_popularity"][bucket]
        yield record(
            what=f"cold: {' '.join(chosen.cold)}, {bucket} items, {before['queries']:.0f} queries",
            metric="recall@100",
            value=after["recall@100"],
            peer="tuned, seed 1",
            peer_value=before["recall@100"],
            command=_command(chosen, "seed=1", *chosen.cold),
        )


def main() -> None:
    """Do the chosen parts of the chosen studies, keep the records of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(STUDIES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, help="instead of the number that each study has")
    arguments = parser.parse_args()
    os.environ["RECSYS_DATA"] = str(arguments.data.resolve())
    for name in arguments.names or STUDIES:
        records = list(study(name, arguments.runs.resolve(), arguments.parts, arguments.seeds))
        done = partial(_is_of, name, arguments.parts)
        replace("retrieval_quality", records, done)


def _is_of(name: str, parts: Sequence[str], row: dict[str, object]) -> bool:
    return row["data"] == name and str(row["what"]).split(":")[0] in parts


if __name__ == "__main__":
    main()
