"""The main job on four real data sets: metrics beside the baselines, index, seconds, memory.

    python benchmarks/end_to_end.py --data ../shared/data --runs /tmp/end_to_end [NAME ...]

Each data set goes through `recsys run` in a process of its own. A finished run is read again, not
repeated: remove its folder to measure anew.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from records import RESULTS, Record, read, replace

from recsys.artifacts import EvaluationReport, ExportedModel, PreparedData, Promotion

mpl.use("Agg")
import matplotlib.pyplot as plt

CONFIGS = {
    "eshop_clothing": "eshop_clothing",
    "online_retail": "benchmarks/configs/online_retail.yaml",
    "taobao": "benchmarks/configs/taobao.yaml",
    "diginetica": "benchmarks/configs/diginetica.yaml",
}
COST = "whole job, 2 cores"
METRICS = ("recall@20", "ndcg@20", "mrr@20")
PUBLISHED = {
    ("diginetica", "recall@20"): "GCE-GNN .5422",
    ("diginetica", "mrr@20"): "GCE-GNN .1904",
    ("eshop_clothing", "recall@20"): "Markov .7044 in the data README",
    ("eshop_clothing", "mrr@20"): "Markov .2578 in the data README",
}


def run(name: str, data: Path, runs: Path) -> list[Record]:
    """Do the main job on one data set and return its figures."""
    folder = runs / name
    command = f"recsys run --config {CONFIGS[name]} --run-dir {folder}"
    executable = Path(sys.executable).with_name("recsys")
    environment = os.environ | {"RECSYS_DATA": str(data.resolve())}
    begun = time.monotonic()
    # Of a refused model nothing is scored: the decision is the last that every job leaves.
    finished = (folder / "promotion" / "manifest.json").is_file()
    process = subprocess.Popen(
        [executable, *command.split()[1:]], env=environment, cwd=Path(__file__).parents[1]
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
    records = [*quality(name, folder, command), *index(name, folder, command)]
    if not finished:
        records += cost(name, time.monotonic() - begun, usage.ru_maxrss / 2**20, command)
    return records


def quality(name: str, folder: Path, command: str) -> list[Record]:
    """The model beside each baseline, by the same evaluator on the same queries."""
    report = EvaluationReport.load(folder / "evaluation")
    prepared = PreparedData.load(folder / "data")
    promoted = (folder / "promotion" / "manifest.json").is_file() and Promotion.load(
        folder / "promotion"
    ).promoted
    what = f"{'promoted' if promoted else 'refused by the gate'}, {report.num_queries} queries"
    assert prepared.test.num_examples == report.num_queries
    return [
        Record(
            what=what,
            data=name,
            metric=metric,
            value=report.model[metric].value,
            peer=baseline,
            peer_value=values[metric].value,
            target=PUBLISHED.get((name, metric), "above every counting baseline"),
            command=command,
        )
        for metric in METRICS
        for baseline, values in report.baselines.items()
    ]


def index(name: str, folder: Path, command: str) -> list[Record]:
    """Recall of the index against exact search."""
    exported = ExportedModel.load(folder / "export")
    found = exported.index
    return [
        Record(
            what=f"{found.kind} index over {exported.num_candidates} items",
            data=name,
            metric=f"recall@{found.k} against exact search",
            value=found.recall,
            peer="exact search",
            peer_value=1.0,
            target="at least 0.95",
            command=command,
        )
    ]


def cost(name: str, seconds: float, peak: float, command: str) -> list[Record]:
    """Wall time of the whole job, and the largest resident set of any of its processes (GiB)."""
    return [
        Record(COST, name, "seconds", seconds, command),
        Record(COST, name, "peak GiB of its largest process", peak, command),
    ]


def has_cost(records: Sequence[Record]) -> bool:
    """Whether the job was run now, and not merely read again."""
    return any(record.what == COST for record in records)


def picture(rows: list[dict[str, object]], file: Path) -> None:
    """Bars of ndcg@20 by data set: the model and each baseline."""
    names = list(dict.fromkeys(str(row["data"]) for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        chosen = [row for row in rows if row["data"] == name and row["metric"] == "ndcg@20"]
        bars = {str(row["peer"]): float(str(row["peer_value"])) for row in chosen}
        bars["two towers"] = float(str(chosen[0]["value"]))
        colours = ["#9aa5b1"] * (len(bars) - 1) + ["#1f6feb"]
        axis.barh(list(bars), list(bars.values()), color=colours)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("ndcg@20, test", fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Run the chosen data sets, keep the records of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CONFIGS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    arguments = parser.parse_args()
    for name in arguments.names or CONFIGS:
        records = run(name, arguments.data, arguments.runs)
        anew = has_cost(records)
        replace(
            "end_to_end",
            records,
            lambda row, data=name, anew=anew: row["data"] == data and (row["what"] != COST or anew),
        )
    picture(read("end_to_end"), RESULTS / "end_to_end.png")


if __name__ == "__main__":
    main()
