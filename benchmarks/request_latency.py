"""A single request through the exported model, and how much of it is TensorFlow's call overhead.

    python benchmarks/request_latency.py RUN_DIR ... [--requests 500]

Each run folder holds `data/` and `export/`. One query after the other is asked for 20 items, by two
ways to call a SavedModel from Python: its signature, and a session with the same feeds and fetches,
which is how TensorFlow Serving runs it. The peer of each is a signature with the same inputs and
outputs that computes nothing: what it costs is overhead. All are asked in turn, request by request,
so that other work on the machine slows them alike; the load is noted.
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
    requests = [
        {name: values[n : n + 1] for name, values in batch.items()}
        | {"k": np.array(K, np.int32), "exclusions": np.full([1, 1], b"", object)}
        for n in range(len(next(iter(batch.values()))))
    ]
    with TemporaryDirectory() as folder:
        trivial = _trivial(tf, exported.directory / "exact", Path(folder))
        folders = {name: exported.directory / name for name in ("scann", "exact")}
        folders["nothing"] = trivial
        calls: dict[str, Call] = {}
        for name, place in folders.items():
            calls[f"{name} signature"] = _signature(tf, place, requests)
            calls[f"{name} session"] = _session(tf, place, requests)
        np.savez(out, **_timed(calls, len(requests)))


def _timed(calls: Mapping[str, Call], count: int) -> dict[str, np.ndarray[Any, Any]]:
    times = {name: np.zeros(count) for name in calls}
    order, random = list(calls), np.random.default_rng(1)
    for name in order:
        for n in range(WARM_UP):
            calls[name](n % count)
    for n in range(count):
        random.shuffle(order)
        for name in order:
            begun = time.perf_counter()
            calls[name](n)
            times[name][n] = 1000 * (time.perf_counter() - begun)
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
        for name in (f"{v} {way}" for way in ("signature", "session") for v in ("scann", "exact")):
            peer = f"nothing {name.split()[1]}"
            for share in (50, 99):
                row = Record(
                    what=f"{name}, threads {threads}",
                    data=f"{run_dir.name}, {items} items",
                    metric=f"p{share} ms",
                    value=float(np.percentile(times[name], share)),
                    peer=f"the same inputs and outputs, {peer}",
                    peer_value=float(np.percentile(times[peer], share)),
                    target=f"{count} requests in turn; load {load:.0f} on {os.cpu_count()} cores",
                    command=f"python benchmarks/request_latency.py {run_dir}",
                )
                made.append(row)
                print(
                    f"{row.data:28} {row.what:32} {row.metric} {row.value:7.3f}, "
                    f"overhead {row.peer_value:6.3f} ({row.peer_value / row.value:.0%})"
                )
    return made


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
