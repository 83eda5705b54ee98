"""Requests to the exported model, one query or 64 at once, and what the time goes to.

    python benchmarks/request_latency.py [RUN_DIR ...] [--untrained 43097 1000000]
                                         [--requests 2000] [--seconds 300]

Each run folder holds `data/` and `export/`; `--untrained` makes two stages of so many items that
nothing has trained (`untrained.py`), as speed does not depend on what was learned. Queries ask for
20 items and filter by nothing. Times are those of a whole batch.

The parts come from the signatures of one model: `embed_query`, `retrieve` (for as many as are
ranked; with one stage `recommend`) and `recommend`. What each takes longer than the one before is
the search, with exclusions and filters, and the ranking, with diversity. The overhead of a call is
that of a signature with the same inputs and outputs that computes nothing. Where there are two
stages, `retrieve` is also asked for the 20 that are shown: an answer of one stage by the same
towers and index.

All are asked in turn, request by request, so that other work on the machine slows them alike; the
load is noted, and processor time beside the clock's, which other work hardly touches. Single
queries are asked `--requests` times. Batches are too where `--seconds` allow it for those of a
variant together, and less often else, spread over the whole; each row tells how often.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

K = 20
#: Queries at once.
BATCHES = (1, 64)
WARM_UP = 12
#: Rounds of batches at least, however long they take.
LEAST = 30
VARIANTS = ("scann", "exact")
THREADS = ("default", "1")
NOTHING = "nothing"
ONE_STAGE = "one_stage"
Call = Callable[[int], Any]
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Effort:
    """How often to ask: single queries `requests` times, batches within `seconds` if they can."""

    requests: int
    seconds: float

    def every(self, size: int, milliseconds: float) -> int:
        """Every how many rounds a variant takes part, whose signatures take that together."""
        if size == 1:
            return 1
        wanted = math.ceil(self.requests * milliseconds / 1000 / self.seconds)
        return max(1, min(wanted, self.requests // LEAST))


@dataclass(frozen=True, slots=True)
class Requests:
    """Makes requests of test queries.

    Attributes:
        queries: raw features, `[n]` or `[n, length]`.
        filters: inputs of filters, and whether they take numbers.
    """

    queries: Arrays
    filters: Mapping[str, bool]

    def __len__(self) -> int:
        return len(next(iter(self.queries.values())))

    def make(self, number: int, size: int, k: int) -> Arrays:
        """All that any signature takes, for `size` queries."""
        rows = np.arange(number * size, (number + 1) * size) % len(self)
        nothing = np.full([size, 1], b"", object)
        ends = np.full([size, 2], np.nan, np.float32)
        asked = {name: ends if ranges else nothing for name, ranges in self.filters.items()}
        rest = {"k": np.array(k, np.int32), "exclusions": nothing}
        return {name: values[rows] for name, values in self.queries.items()} | rest | asked


def measure(run_dir: Path, effort: Effort, out: Path) -> None:
    """Write the milliseconds of every batch by variant, signature and size, `[rounds, 2]` each."""
    import tensorflow as tf
    from scann.scann_ops.py import scann_ops  # noqa: F401  (registers the ops)

    from recsys.artifacts import ExportedModel, PreparedData
    from recsys.dataset import raw_batches

    data, exported = PreparedData.load(run_dir / "data"), ExportedModel.load(run_dir / "export")
    contract = _contract(exported.directory)
    filters = {f["input"]: f["kind"] == "between" for f in contract.get("filters", {}).values()}
    queries = next(iter(raw_batches(data, data.test, 1000).as_numpy_iterator()))
    requests = Requests(queries, filters)
    depth = contract.get("ranking", {}).get("candidates", K)
    with TemporaryDirectory() as folder:
        models = {name: tf.saved_model.load(str(exported.directory / name)) for name in VARIANTS}
        models[NOTHING] = _trivial(tf, models["exact"], Path(folder))
        calls = {
            f"{name} {signature} {size}": _call(tf, model, signature, requests, size, depth)
            for name, model in models.items()
            for signature in ("embed_query", "retrieve", ONE_STAGE, "recommend")
            for size in BATCHES
            if _asked(signature) in model.signatures
        }
        np.savez(out, **_timed(calls, effort))


def _asked(signature: str) -> str:
    """What the model calls it."""
    return "retrieve" if signature == ONE_STAGE else signature


def _contract(export: Path) -> dict[str, Any]:
    contract: dict[str, Any]
    contract = json.loads((export / "exact" / "assets.extra" / "contract.json").read_text("utf-8"))
    return contract


def _call(tf: Any, model: Any, name: str, requests: Requests, size: int, depth: int) -> Call:
    signature = model.signatures[_asked(name)]
    inputs = signature.structured_input_signature[1]
    k = depth if name == "retrieve" else K
    tensors = [
        {n: tf.constant(v) for n, v in requests.make(number, size, k).items() if n in inputs}
        for number in range(max(1, len(requests) // size))
    ]

    def call(n: int, keep: Any = model) -> None:
        for output in signature(**tensors[n % len(tensors)]).values():
            output.numpy()

    return call


def _timed(calls: Mapping[str, Call], effort: Effort) -> Arrays:
    """Milliseconds of clock and of processor of every batch, `[rounds, 2]` by call."""
    times: dict[str, list[Any]] = {name: [] for name in calls}
    order, random = list(calls), np.random.default_rng(1)
    every = _every(calls, effort)
    for n in range(effort.requests):
        random.shuffle(order)
        for name in order:
            if n % every[_kind(name)] == 0:
                times[name].append(_milliseconds(calls[name], n))
    return {name: np.array(rounds) for name, rounds in times.items()}


def _every(calls: Mapping[str, Call], effort: Effort) -> dict[tuple[str, int], int]:
    """Warm up, and tell every how many rounds each variant is asked in each size."""
    taken: dict[tuple[str, int], float] = {}
    for name, call in calls.items():
        warm = [_milliseconds(call, n)[0] for n in range(WARM_UP)][WARM_UP // 2 :]
        taken[_kind(name)] = taken.get(_kind(name), 0.0) + float(np.median(warm))
    return {kind: effort.every(kind[1], milliseconds) for kind, milliseconds in taken.items()}


def _kind(name: str) -> tuple[str, int]:
    """Variant and size of a call; all of a kind are asked equally often."""
    variant, _, size = name.split()
    return variant, int(size)


def _milliseconds(call: Call, n: int) -> np.ndarray[Any, Any]:
    """Of clock and of processor, `[2]`."""
    begun = np.array([time.perf_counter(), time.process_time()])
    call(n)
    return 1000 * (np.array([time.perf_counter(), time.process_time()]) - begun)


def _trivial(tf: Any, model: Any, folder: Path) -> Any:
    """A model with the inputs and outputs of another one that answers with constants."""
    module = tf.Module()
    made = {}
    for name in ("embed_query", "recommend"):
        signature = model.signatures[name]
        outputs = {
            output: tf.zeros([1, *(size or K for size in spec.shape[1:].as_list())], spec.dtype)
            for output, spec in signature.structured_outputs.items()
        }
        answer = tf.function(partial(_constant, outputs))
        setattr(module, name, answer)
        made[name] = answer.get_concrete_function(**signature.structured_input_signature[1])
    tf.saved_model.save(module, str(folder), signatures=made)
    return tf.saved_model.load(str(folder))


def _constant(outputs: Any, /, **_: Any) -> Any:
    return outputs


def records(run_dir: Path, effort: Effort, command: str) -> Iterator[Any]:
    """Measure in a process for each number of threads, and make the rows of the table."""
    from records import Record

    from recsys.artifacts import ExportedModel

    exported = ExportedModel.load(run_dir / "export")
    stages = "two stages" if "ranking" in _contract(exported.directory) else "one stage"
    data = f"{run_dir.name}, {exported.num_candidates} items, {stages}"
    for threads in THREADS:
        load = os.getloadavg()[0]
        times = _in_a_process(run_dir, effort, threads)
        for variant in VARIANTS:
            for size in BATCHES:
                rounds = len(times[f"{variant} recommend {size}"])
                told = f"{rounds} rounds in turn; load {load:.1f} on {os.cpu_count()} cores"
                what = f"{variant}, {size} at once, threads {threads}"
                record = partial(Record, what, data, command=command, target=told)
                yield from _rows(record, times, variant, size)


def _in_a_process(run_dir: Path, effort: Effort, threads: str) -> Arrays:
    settings = {} if threads == "default" else dict.fromkeys(_THREAD_SETTINGS, threads)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "times.npz"
        command = [sys.executable, __file__, str(run_dir), "--inner", str(out)]
        subprocess.run(
            [*command, "--requests", str(effort.requests), "--seconds", str(effort.seconds)],
            env=os.environ | settings | {"TF_CPP_MIN_LOG_LEVEL": "3"},
            check=True,
        )
        return dict(np.load(out))


def _rows(record: Callable[..., Any], times: Arrays, variant: str, size: int) -> Iterator[Any]:
    """The whole beside a call that computes nothing and one stage; its parts beside the whole."""

    def of(name: str, signature: str, column: int = 0, share: float = 50) -> float:
        return float(np.percentile(times[f"{name} {signature} {size}"][:, column], share))

    for metric, column, share in _METRICS:
        value = of(variant, "recommend", column, share)
        peer_value = of(NOTHING, "recommend", column, share)
        peer = "a signature that computes nothing"
        yield record(metric=metric, value=value, peer=peer, peer_value=peer_value)
        if f"{variant} {ONE_STAGE} {size}" in times:
            one = of(variant, ONE_STAGE, column, share)
            yield record(
                metric=f"{metric}: one stage", value=one, peer="two stages", peer_value=value
            )
    whole, embed = of(variant, "recommend"), of(variant, "embed_query")
    overhead, overhead_of_embed = of(NOTHING, "recommend"), of(NOTHING, "embed_query")
    first = f"{variant} retrieve {size}" in times
    retrieve = of(variant, "retrieve") if first else whole
    parts = {
        "overhead of a call": overhead,
        "embed the query": embed - overhead_of_embed,
        "search, exclude, filter": retrieve - embed - overhead + overhead_of_embed,
    } | ({"rank": whole - retrieve} if first else {})
    for part, value in parts.items():
        metric, peer = f"p50 ms: {part}", "all of recommend"
        yield record(metric=metric, value=value, peer=peer, peer_value=whole)


#: Name, column of the times (clock, processor), percentile.
_METRICS = (("p50 ms", 0, 50), ("p99 ms", 0, 99), ("p50 processor ms", 1, 50))
_THREAD_SETTINGS = ("TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS")


def _untrained(num_items: int, folder: Path) -> Path:
    """Two stages of so many items; made in a process of its own, whose memory is free after."""
    run_dir = folder / "untrained"
    code = (
        "import sys, pathlib, untrained; from recsys.ranking_config import Ranking; "
        "config = untrained.run_config('untrained', 100).model_copy(update={'ranking': Ranking()});"
        "untrained.exported(config, pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(run_dir), str(num_items)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        check=True,
    )
    return run_dir


def main() -> None:
    """Measure the runs that are named and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--untrained", type=int, nargs="*", default=[], metavar="ITEMS")
    parser.add_argument("--requests", type=int, default=2000, help="rounds of single queries")
    parser.add_argument("--seconds", type=float, default=300, help="for the batches of a variant")
    parser.add_argument("--inner", type=Path, help="measure here, write the times to this file")
    arguments = parser.parse_args()
    effort = Effort(arguments.requests, arguments.seconds)
    if arguments.inner:
        measure(arguments.runs[0], effort, arguments.inner)
        return
    from records import replace

    command = " ".join(["python benchmarks/request_latency.py", *sys.argv[1:]])
    made = []

    def keep(run_dir: Path) -> None:
        for row in records(run_dir, effort, command):
            made.append(row)
            share = f"{row.value / row.peer_value:6.2f} of {row.peer}"
            print(f"{row.data:42} {row.what:34} {row.metric:32} {row.value:9.3f} {share}")

    for run_dir in arguments.runs:
        keep(run_dir)
    for num_items in arguments.untrained:
        with TemporaryDirectory() as folder:
            keep(_untrained(num_items, Path(folder)))
    measured = {row.data for row in made}
    replace("request_latency", made, lambda row: row["data"] in measured)


if __name__ == "__main__":
    main()
