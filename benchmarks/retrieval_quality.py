"""Accuracy of retrieval on public protocols: seeds, ablations, defaults, counting baselines.

    python benchmarks/retrieval_quality.py --data ../shared/data --runs /tmp/quality [STUDY ...]

Each data set is prepared once; each variant and seed is fitted and evaluated by `recsys fit` and
`recsys evaluate` in processes of their own, over the whole corpus. A finished one is read again,
not repeated. Epochs are chosen on the validation split; the test split is read once, by `evaluate`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from records import Record, replace

from recsys.artifacts import EvaluationReport, TrainedModel
from recsys.config import load_config
from recsys.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
RECSYS = Path(sys.executable).with_name("recsys")
#: What the package does where a config says nothing of model and train.
DEFAULTS = "defaults"


@dataclass(frozen=True)
class Study:
    """One data set and protocol: metrics with what to beat and the target, variants by name."""

    config: str
    peers: dict[str, tuple[str, float, float]]
    seeds: int
    variants: dict[str, tuple[str, ...]]


ENCODERS = {f"encoder {kind}": (f"model.history.kind={kind}",) for kind in ("mean", "gru", "lstm")}
STUDIES = {
    "amazon_beauty": Study(
        "benchmarks/configs/amazon_beauty.yaml",
        {"recall@10": ("eSASRec", 0.0928, 0.095), "ndcg@10": ("SASRec+SS", 0.0531, 0.055)},
        3,
        ENCODERS
        | {
            "loss sampled, in-batch only": (
                "model.loss.full_softmax_up_to=0",
                "model.loss.num_uniform_negatives=0",
            ),
            "loss sampled, mixed": (
                "model.loss.full_softmax_up_to=0",
                "model.loss.num_uniform_negatives=2048",
            ),
            "loss in float32": ("model.loss.half_precision=false",),
            "dot product": ("model.loss.normalize=false", "model.loss.temperature=1.0"),
            "constant learning rate": ("train.schedule=constant",),
            "dropout 0.2": ("model.dropout=0.2",),
            "embeddings not shared": ("model.share_item_embeddings=false",),
        },
    ),
    "amazon_beauty_attributes": Study(
        "benchmarks/configs/amazon_beauty_attributes.yaml",
        {"recall@10": ("prototype", 0.0956, 0.105), "ndcg@10": ("prototype", 0.0559, 0.062)},
        3,
        {"ids dropped": ("model.id_dropout=0.1",)},
    ),
    "diginetica": Study(
        "benchmarks/configs/diginetica.yaml",
        {"recall@20": ("GCE-GNN", 0.5422, 0.550), "mrr@20": ("GCE-GNN", 0.1904, 0.195)},
        1,
        {},
    ),
    "eshop_clothing": Study(
        "training/configs/eshop_clothing.yaml",
        {"recall@20": ("Markov", 0.7044, 0.75), "mrr@20": ("Markov", 0.2578, 0.29)},
        3,
        ENCODERS,
    ),
    "taobao": Study(
        "benchmarks/configs/taobao.yaml",
        {"ndcg@20": ("best counting baseline", 0.1620, 0.1944)},
        3,
        {},
    ),
}


def study(name: str, data: Path, runs: Path) -> list[Record]:
    """Figures of one study: the tuned config by seed, then each variant with one seed."""
    chosen = STUDIES[name]
    environment = os.environ | {"RECSYS_DATA": str(data.resolve())}
    prepared = runs / name / "prepared"
    _do(
        ["prepare", "--config", chosen.config, "--run-dir", prepared],
        prepared / "data",
        environment,
    )
    records: list[Record] = []
    tuned = [
        _fit(
            chosen,
            runs / name / f"seed-{seed}",
            (f"seed={seed}",),
            prepared,
            environment,
            seed == 1,
        )
        for seed in range(1, chosen.seeds + 1)
    ]
    records += _mean_records(name, chosen, tuned)
    records += _baseline_records(name, chosen, tuned[0])
    for label, overrides in chosen.variants.items():
        folder = runs / name / label.replace(" ", "-").replace(",", "")
        run = _fit(chosen, folder, ("seed=1", *overrides), prepared, environment, False)
        records += _variant_records(name, chosen, label, overrides, run, tuned[0])
    return records


@dataclass(frozen=True)
class _Run:
    folder: Path
    report: EvaluationReport
    model: TrainedModel
    seconds: float


def _do(arguments: Sequence[str | Path], directory: Path, environment: dict[str, str]) -> float:
    """Run a step unless it is finished; returns its seconds, which are kept beside it."""
    clock = directory.with_name(f"{directory.name}.seconds")
    if not (directory / "manifest.json").is_file():
        begun = time.monotonic()
        subprocess.run([RECSYS, *arguments], env=environment, check=True, cwd=ROOT)
        clock.write_text(f"{time.monotonic() - begun:.0f}")
    return float(clock.read_text())


def _fit(
    chosen: Study,
    folder: Path,
    overrides: tuple[str, ...],
    prepared: Path,
    environment: dict[str, str],
    with_baselines: bool,
) -> _Run:
    os.environ.update(environment)
    if not with_baselines:
        overrides = (*overrides, "evaluation.baselines=[popularity]")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").is_file():
        RunFolder(folder).freeze(load_config(ROOT / chosen.config, overrides))
        (folder / "data").symlink_to(prepared / "data")
    seconds = _do(["fit", "--run-dir", folder], folder / "model", environment)
    _do(["evaluate", "--run-dir", folder], folder / "evaluation", environment)
    report = EvaluationReport.load(folder / "evaluation")
    return _Run(folder, report, TrainedModel.load(folder / "model"), seconds)


def _command(chosen: Study, *overrides: str) -> str:
    changed = "".join(f" --set {override}" for override in overrides)
    return f"recsys run --config {chosen.config}{changed}"


def _mean_records(name: str, chosen: Study, runs: Sequence[_Run]) -> list[Record]:
    records = []
    for metric, (peer, value, target) in chosen.peers.items():
        figures = [run.report.model[metric].value for run in runs]
        spread = f", standard deviation {stdev(figures):.4f}" if len(figures) > 1 else ""
        records.append(
            Record(
                what=f"tuned, mean of {len(figures)} seeds{spread}",
                data=name,
                metric=metric,
                value=mean(figures),
                peer=peer,
                peer_value=value,
                target=f"at least {target}",
                command=_command(chosen, f"seed=1..{len(figures)}"),
            )
        )
    seconds = mean(run.seconds for run in runs)
    return [
        *records,
        Record("fit", name, "seconds", seconds, "", None, "", _command(chosen, "seed=1")),
    ]


def _baseline_records(name: str, chosen: Study, run: _Run) -> list[Record]:
    return [
        Record(
            what="tuned, seed 1",
            data=name,
            metric=metric,
            value=run.report.model[metric].value,
            peer=baseline,
            peer_value=values[metric].value,
            target="above",
            command=_command(chosen, "seed=1"),
        )
        for metric in chosen.peers
        for baseline, values in run.report.baselines.items()
    ]


def _variant_records(
    name: str, chosen: Study, label: str, overrides: tuple[str, ...], run: _Run, tuned: _Run
) -> list[Record]:
    return [
        Record(
            what=label,
            data=name,
            metric=metric,
            value=run.report.model[metric].value,
            peer="tuned, seed 1",
            peer_value=tuned.report.model[metric].value,
            target="",
            command=_command(chosen, "seed=1", *overrides),
        )
        for metric in chosen.peers
    ]


def main() -> None:
    """Do the chosen studies, keep the records of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(STUDIES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    arguments = parser.parse_args()
    for name in arguments.names or STUDIES:
        records = study(name, arguments.data, arguments.runs.resolve())
        replace("retrieval_quality", records, lambda row, data=name: row["data"] == data)


if __name__ == "__main__":
    main()
