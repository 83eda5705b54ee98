"""A single request through the exported model, and how much of it is TensorFlow's call overhead.

    python benchmarks/request_latency.py RUN_DIR ... [--requests 500]

Each run folder holds `data/` and `export/`. One query after the other is asked for 20 items, by two
ways to call a SavedModel from Python: its signature, and a session with the same feeds and fetches,
which is how TensorFlow Serving runs it. The peer of each is a signature with the same inputs and
outputs that computes nothing: what it costs is overhead. A third way asks for 32 queries at once;
its time is that of one of them. All are asked in turn, request by request, so that other work on
the machine slows them alike; the load is noted, and processor time beside the clock's, which other
work hardly touches.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

K = 20
WARM_UP = 50
BATCH = 32
THREADS = ("default", "1")
Call = Callable[[int], Any]


def measure(run_dir: Path, count: int, out: Path) -> None:
    """Write the milliseconds of every request by way to ask it, `[count]` each."""
    import tensorflow as tf
    from scann.scann_ops.py import scann_ops  # noqa: F401  (registers the ops)

    from recsys.artifacts import ExportedModel, PreparedData
    from recsys.dataset import raw_batches

    data, exported = PreparedData.load(run_dir / "data"), ExportedModel.load(run_dir / "export")
    batch = next(iter(raw_batches(data, data.test, count).as_numpy_iterator()))
    size = len(next(iter(batch.values())))

    def requests(at_once: int) -> list[dict[str, Any]]:
        rows = [np.arange(n, n + at_once) % size for n in range(size)]
        rest = {"k": np.array(K, np.int32), "exclusions": np.full([at_once, 1], b"", object)}
        return [{name: v[chosen] for name, v in batch.items()} | rest for chosen in rows]

    with TemporaryDirectory() as folder:
        trivial = _trivial(tf, exported.directory / "exact", Path(folder))
        folders = {name: exported.directory / name for name in ("scann", "exact")}
        folders["nothing"] = trivial
        calls: dict[str, Call] = {}
        for name, place in folders.items():
            calls[f"{name} signature"] = _signature(tf, place, requests(1))
            calls[f"{name} session"] = _session(tf, place, requests(1))
            calls[f"{name} batches"] = _signature(tf, place, requests(BATCH))
        np.savez(out, **_timed(calls, size))


def _timed(calls: Mapping[str, Call], count: int) -> dict[str, np.ndarray[Any, Any]]:
    """Milliseconds of clock and of processor for every request, `[count, 2]` by way to ask it."""
    times = {name: np.zeros([count, 2]) for name in calls}
    order, random = list(calls), np.random.default_rng(1)
    for name in order:
        for n in range(WARM_UP):
            calls[name](n % count)
    for n in range(count):
        random.shuffle(order)
        for name in order:
            begun = np.array([time.perf_counter(), time.process_time()])
            calls[name](n)
            taken = np.array([time.perf_counter(), time.process_time()]) - begun
            times[name][n] = 1000 * taken / (BATCH if name.endswith("batches") else 1)
    return times


def _signature(tf: Any, folder: Path, requests: list[dict[str, Any]]) -> Call:
    model = tf.saved_model.load(str(folder))
    tensors = [{name: tf.constant(value) for name, value in r.items()} for r in requests]
    recommend = model.signatures["recommend"]

    def call(n: int, keep: Any = model) -> None:
        answer = recommend(**tensors[n])
        answer["ids"].numpy(), answer["scores"].numpy()

    return call


def _session(tf: Any, folder: Path, requests: list[dict[str, Any]]) -> Call:
    v1 = tf.compat.v1
    session = v1.Session(graph=tf.Graph())
    with session.graph.as_default():
        loaded = v1.saved_model.load(session, ["serve"], str(folder))
    signature = loaded.signature_def["recommend"]
    inputs = sorted(signature.inputs)
    run = session.make_callable(
        [signature.outputs[name].name for name in ("ids", "scores")],
        [signature.inputs[name].name for name in inputs],
    )
    values = [[np.asarray(request[name]) for name in inputs] for request in requests]
    return lambda n: run(*values[n])


def _trivial(tf: Any, model: Path, folder: Path) -> Path:
    """Save a model with the inputs and outputs of another one that answers with constants."""
    inputs = tf.saved_model.load(str(model)).signatures["recommend"].structured_input_signature[1]
    ids, scores = tf.fill([1, K], "an item"), tf.zeros([1, K])
    module = tf.Module()
    module.answer = tf.function(lambda **_: {"ids": ids, "scores": scores})
    signatures = {"recommend": module.answer.get_concrete_function(**inputs)}
    tf.saved_model.save(module, str(folder), signatures=signatures)
    return folder


def records(run_dir: Path, count: int) -> list[Any]:
    """Measure in a process for each number of threads, and make the rows of the table."""
    from records import Record

    from recsys.artifacts import ExportedModel

    items = ExportedModel.load(run_dir / "export").num_candidates
    made = []
    for threads in THREADS:
        settings = {} if threads == "default" else dict.fromkeys(_THREAD_SETTINGS, threads)
        with TemporaryDirectory() as folder:
            out = Path(folder) / "times.npz"
            command = [sys.executable, __file__, str(run_dir), "--requests", str(count)]
            load = os.getloadavg()[0]
            subprocess.run(
                [*command, "--inner", str(out)],
                env=os.environ | settings | {"TF_CPP_MIN_LOG_LEVEL": "3"},
                check=True,
            )
            times = dict(np.load(out))
        ways = ("signature", "session", "batches")
        for variant, way in ((v, way) for way in ways for v in ("scann", "exact")):
            ours, nothing = times[f"{variant} {way}"], times[f"nothing {way}"]
            for metric, column, share in _METRICS:
                row = Record(
                    what=f"{variant}, {_WAYS[way]}, threads {threads}",
                    data=f"{run_dir.name}, {items} items",
                    metric=metric,
                    value=float(np.percentile(ours[:, column], share)),
                    peer="a signature that computes nothing",
                    peer_value=float(np.percentile(nothing[:, column], share)),
                    target=f"{count} requests in turn; load {load:.0f} on {os.cpu_count()} cores",
                    command=f"python benchmarks/request_latency.py {run_dir}",
                )
                made.append(row)
                print(
                    f"{row.data:28} {row.what:42} {metric:14} {row.value:7.3f}, "
                    f"overhead {row.peer_value:6.3f} ({row.peer_value / row.value:.0%})"
                )
    return made


_WAYS = {
    "signature": "one by one",
    "session": "one by one in a session",
    "batches": f"{BATCH} at once",
}
#: Name, column of the times (clock, processor), percentile.
_METRICS = (("p50 ms", 0, 50), ("p99 ms", 0, 99), ("p50 processor ms", 1, 50))
_THREAD_SETTINGS = ("TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS")


def main() -> None:
    """Measure the runs that are named and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--inner", type=Path, help="measure here, write the times to this file")
    arguments = parser.parse_args()
    if arguments.inner:
        measure(arguments.runs[0], arguments.requests, arguments.inner)
        return
    from records import write

    write(
        "request_latency", [r for run in arguments.runs for r in records(run, arguments.requests)]
    )


if __name__ == "__main__":
    main()
