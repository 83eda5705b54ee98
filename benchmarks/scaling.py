"""Scaling of training over workers: one and two of them, each on a core of its own.

    recsys prepare --config benchmarks/configs/amazon_beauty.yaml --run-dir RUN
    python benchmarks/scaling.py RUN

Both learn with the same global batches by `launch`, on tasks of a local Spark: with the config as
it is, and as one would on a cluster (negatives that are drawn, two blocks of attention). The steps
after the first ones are timed in the chief, by the clock, which needs two free cores, and of its
processor, which says on a busy machine too what two workers do not have to do twice. What workers
exchange in a step is then exchanged alone, many times: the share of a step that communication
takes. From these the last rows compute, on paper, the cost with more workers and a slower network.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import recsys  # noqa: F401  # isort: skip

import numpy as np
import tensorflow as tf
from epoch_clock import EpochClock
from records import Record, replace

from recsys.artifacts import PreparedData, TrainedModel
from recsys.config import Cluster, RunConfig
from recsys.models.retrieval import TwoTower
from training.distribute import launch
from training.fit import _Inputs, _share
from training.session import spark_session

#: The first is not counted.
EPOCHS = 3
STEPS = 30
EXCHANGES = 30
#: Changes to `model` and `train` of the config.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "as configured": {},
    "drawn negatives, two blocks": {
        "model": {
            "history": {"kind": "attention", "num_blocks": 2},
            "loss": {"full_softmax_up_to": 0, "num_uniform_negatives": 2048},
        },
        "train": {"global_batch_size": 512},
    },
}
#: Of the paper part: a network between machines, and seconds until a message arrives.
BYTES_PER_SECOND = 10e9 / 8
LATENCY = 50e-6
NUM_PAPER_WORKERS = (8, 64)


def timed(config: RunConfig, data: PreparedData, result: Path) -> TrainedModel | None:
    """Train on this worker's core; the chief writes what it took to `result`."""
    rank = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {rank})
    strategy = tf.distribute.get_strategy()
    tf.keras.utils.set_random_seed(config.seed)
    tf.config.experimental.enable_op_determinism()
    inputs = _Inputs(config, data)
    model = inputs.build_model([data.train])
    steps = min(STEPS, inputs.steps_per_epoch([data.train]))
    clock = EpochClock()

    def batches(context: tf.distribute.InputContext) -> tf.data.Dataset:
        own = inputs.training([data.train], range(EPOCHS), share=_share(context))
        return own.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))

    model.fit(
        strategy.distribute_datasets_from_function(batches),
        epochs=EPOCHS,
        steps_per_epoch=steps,
        verbose=0,
        callbacks=[clock],
    )
    one = next(iter(inputs.training([data.train], range(1), share=_share(_alone(strategy)))))
    figures = {
        "step": min(clock.seconds[1:]) / steps,
        "processor": min(clock.processor_seconds[1:]) / steps,
    }
    figures |= _exchange(strategy, model, one)
    if rank == 0:
        result.write_text(json.dumps(figures))
    return None


def _alone(strategy: tf.distribute.Strategy) -> tf.distribute.InputContext:
    rank = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    workers = strategy.num_replicas_in_sync
    return tf.distribute.InputContext(workers, rank, workers)


def _exchange(
    strategy: tf.distribute.Strategy, model: TwoTower, batch: dict[str, tf.Tensor]
) -> dict[str, float]:
    """Seconds a step to exchange its gradients alone, and their bytes by kind."""

    def differentiate() -> list[Any]:
        with tf.GradientTape() as tape:
            loss = model.compute_loss(batch, training=True)
        return model.gradients(tape, loss)

    gradients = strategy.run(differentiate)

    def aggregate() -> list[Any]:
        pairs = list(zip(gradients, model.trainable_variables, strict=True))
        return [gradient for gradient, _ in model.optimizer.aggregate_gradients(pairs)]

    run = tf.function(lambda: strategy.run(aggregate))
    run()
    begun = time.perf_counter()
    for _ in range(EXCHANGES):
        run()
    sparse = [g for g in gradients if isinstance(g, tf.IndexedSlices)]
    dense = [g for g in gradients if not isinstance(g, tf.IndexedSlices)]
    numbers = [(g.values.shape.num_elements(), g.indices.shape.num_elements()) for g in sparse]
    return {
        "exchange": (time.perf_counter() - begun) / EXCHANGES,
        "dense_bytes": float(sum(g.shape.num_elements() * 4 for g in dense)),
        "sparse_bytes": float(sum(4 * values + 8 * rows for values, rows in numbers)),
        "tables_bytes": float(sum(int(np.prod(g.dense_shape)) * 4 for g in sparse)),
    }


def measure(config: RunConfig, data: PreparedData, workers: int) -> dict[str, float]:
    """Seconds of a step with so many workers."""
    cluster = Cluster(kind="spark", master=f"local[{workers}]", workers=workers, max_restarts=0)
    with TemporaryDirectory() as folder:
        result = Path(folder) / "figures.json"
        session = partial(spark_session, cluster, "scaling")
        # Workers import it anew.
        fn = importlib.import_module(Path(__file__).stem).timed
        launch(fn, cluster, config, data, result, folder=Path(folder), spark=session)
        figures: dict[str, float] = json.loads(result.read_text())
    return figures


def records(
    name: str, variant: str, one: dict[str, float], two: dict[str, float]
) -> Iterator[Record]:
    """What was measured, and what follows on paper."""
    command = f'python benchmarks/scaling.py {name} --variant "{variant}"'
    record = partial(Record, data=f"{name}, {variant}", command=command)
    yield record(
        what="2 workers on a core each, same global batches",
        metric="steps/s",
        value=1 / two["step"],
        peer="1 worker on a core",
        peer_value=1 / one["step"],
        target="ratio at least 1.7",
    )
    yield record(
        what="processor time of the chief, 1 worker beside 2",
        metric="ms a step",
        value=1000 * one["processor"],
        peer="of 2 workers",
        peer_value=1000 * two["processor"],
    )
    yield record(
        what="2 workers: exchange of gradients",
        metric="ms a step",
        value=1000 * two["exchange"],
        peer="the whole step",
        peer_value=1000 * two["step"],
    )
    yield record(
        what="gradients of rows of a worker of 2",
        metric="MB a step",
        value=two["sparse_bytes"] / 1e6,
        peer="of whole tables",
        peer_value=two["tables_bytes"] / 1e6,
    )
    yield record("other gradients", metric="MB a step", value=two["dense_bytes"] / 1e6)
    for workers in NUM_PAPER_WORKERS:
        yield record(
            what=f"on paper, {workers} workers, 10 Gbit/s, same global batches: seconds of a step",
            metric="ms",
            value=1000 * on_paper(one, two, workers),
            peer="1 worker on a core",
            peer_value=1000 * one["step"],
        )


def on_paper(one: dict[str, float], two: dict[str, float], workers: int) -> float:
    """Seconds of a step: what can be shared is, dense gradients go round a ring, slices to all.

    A ring moves `2 (n - 1) / n` times the dense bytes through each link (Patarasu and Yuan, 2009),
    in `2 (n - 1)` messages. The slices of all workers together are those of the global batch, of
    which each sends its own to all others. What does not shrink with workers is the rest of a step
    of two beyond half of one.
    """
    compute = one["step"]
    fixed = max(0.0, two["step"] - compute / 2 - two["exchange"])
    ring = 2 * (workers - 1) * (two["dense_bytes"] / workers / BYTES_PER_SECOND + LATENCY)
    slices = 2 * two["sparse_bytes"] / workers
    gathered = (workers - 1) * (slices / BYTES_PER_SECOND + LATENCY)
    return compute / workers + fixed + ring + gathered


def changed(config: RunConfig, variant: str) -> RunConfig:
    """Return the config with the changes of a variant."""
    values = config.model_dump()
    for section, changes in VARIANTS[variant].items():
        for key, value in changes.items():
            old = values[section][key]
            values[section][key] = old | value if isinstance(value, dict) else value
    return RunConfig.model_validate(values)


def measured(run: Path, variant: str, workers: int) -> dict[str, float]:
    """Measure so many workers in a process of its own."""
    command = [sys.executable, __file__, str(run), "--variant", variant, "--workers", str(workers)]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    told = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    figures: dict[str, float] = json.loads(told.splitlines()[-1])
    print(variant, workers, figures, flush=True)
    return figures


def main() -> None:
    """Measure one worker and two, with each variant or one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run that was prepared")
    parser.add_argument("--variant", choices=VARIANTS, help="measure this alone")
    parser.add_argument("--workers", type=int, help="measure these alone")
    arguments = parser.parse_args()
    run = arguments.run.absolute()
    config = RunConfig.model_validate_json((run / "config.json").read_text("utf-8"))
    if arguments.workers:
        data = PreparedData.load(run / "data")
        print(json.dumps(measure(changed(config, arguments.variant), data, arguments.workers)))
        return
    for variant in [arguments.variant] if arguments.variant else VARIANTS:
        one, two = (measured(run, variant, workers) for workers in (1, 2))
        made = list(records(config.name, variant, one, two))
        replace("scaling", made, lambda row, data=made[0].data: row["data"] == data)


if __name__ == "__main__":
    main()
