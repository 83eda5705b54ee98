"""Speed of training beside TFRS's tutorial of sequential retrieval, at the same work.

    recsys prepare --config benchmarks/configs/diginetica.yaml --run-dir RUN
    python benchmarks/training_speed.py RUN

Both learn every label of the training sequences from the same history before it, by a GRU of the
same size and Adagrad, with as many labels a step that are each other's negatives; then both rank
the validation queries over the whole corpus. The peer is the model of
https://www.tensorflow.org/recommenders/examples/sequential_retrieval, one example per label, cached
batches. Each side runs in a process of its own, one after the other, twice. The first epoch, which
traces and fills caches, is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

# Before TFRS, which looks for the Keras that recsys chooses.
import recsys  # noqa: F401  # isort: skip

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs
from epoch_clock import EpochClock
from numpy.typing import NDArray
from records import Record, replace

from recsys.artifacts import PreparedData
from recsys.config import RunConfig
from recsys.dataset import read_corpus, read_interactions
from recsys.sequences import Order, training_batches
from training.fit import _Inputs

DIM = 64
LABELS_PER_STEP = 4096
EPOCHS = 3
ROUNDS = 2
_TUTORIAL_EVALUATION_BATCH = 2560
_TUTORIAL_CANDIDATE_BATCH = 128


def ours(config: RunConfig, data: PreparedData) -> dict[str, float]:
    """Train and validate as `recsys fit` does."""
    tf.keras.utils.set_random_seed(config.seed)
    tf.config.experimental.enable_op_determinism()
    labels = data.train.num_examples / data.train.num_sequences
    loss = {"full_softmax_up_to": 0, "num_uniform_negatives": 0, "normalize": False}
    model_changes = {
        "embedding_dim": DIM,
        "dropout": 0.0,
        "candidate_dropout": 0.0,
        "hidden": (),
        "num_neighbours": 0,
        "history": config.model.history.model_copy(update={"kind": "gru", "repeats": False}),
        "loss": config.model.loss.model_copy(update=loss | {"temperature": 1.0}),
    }
    train_changes = {"optimizer": "adagrad", "global_batch_size": round(LABELS_PER_STEP / labels)}
    changed = config.model_copy(
        update={
            "model": config.model.model_copy(update=model_changes),
            "train": config.train.model_copy(update=train_changes | {"learning_rate": 0.1}),
        }
    )
    inputs = _Inputs(changed, data)
    model = inputs.build_model([data.train])
    clock = EpochClock()
    steps = inputs.steps_per_epoch([data.train])
    batches = inputs.training([data.train], range(EPOCHS))
    model.fit(batches, epochs=EPOCHS, steps_per_epoch=steps, verbose=0, callbacks=[clock])
    return _figures(clock, lambda: inputs.validate(model))


class Tutorial(tfrs.Model):
    """The tutorial's model."""

    def __init__(self, items: NDArray[np.bytes_]) -> None:
        super().__init__()
        self._query = tf.keras.Sequential([*_embedding(items), tf.keras.layers.GRU(DIM)])
        self._candidate = tf.keras.Sequential(_embedding(items))
        corpus = tf.data.Dataset.from_tensor_slices(items).batch(_TUTORIAL_CANDIDATE_BATCH)
        metric = tfrs.metrics.FactorizedTopK(candidates=corpus.map(self._candidate))
        self._task = tfrs.tasks.Retrieval(metrics=metric)

    def compute_loss(self, features: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Loss of a batch; the metric only where there is no training, as the tutorial advises."""
        query = self._query(features["history"])
        candidate = self._candidate(features["label"])
        return self._task(query, candidate, compute_metrics=not training)


def _embedding(items: NDArray[np.bytes_]) -> list[tf.keras.layers.Layer]:
    lookup = tf.keras.layers.StringLookup(vocabulary=items.tolist())
    return [lookup, tf.keras.layers.Embedding(len(items) + 1, DIM)]


def tutorial(config: RunConfig, data: PreparedData) -> dict[str, float]:
    """Train and evaluate as the tutorial does."""
    length = config.schema_.history_length
    history = config.schema_.item_histories[0].name
    examples = _examples(data, history, length)
    items = np.unique(np.concatenate([examples["label"], examples["history"].ravel()]))
    model = Tutorial(items[items != b""])
    model.compile(optimizer=tf.keras.optimizers.Adagrad(learning_rate=0.1))
    train = tf.data.Dataset.from_tensor_slices(examples).shuffle(10_000).batch(LABELS_PER_STEP)
    clock = EpochClock()
    model.fit(train.cache(), epochs=EPOCHS, verbose=0, callbacks=[clock])
    queries = tf.data.Dataset.from_tensor_slices(_queries(data))
    test = queries.batch(_TUTORIAL_EVALUATION_BATCH).cache()
    return _figures(clock, lambda: model.evaluate(test, verbose=0))


def _examples(data: PreparedData, history: str, length: int) -> dict[str, NDArray[np.bytes_]]:
    """One example per label: the events before it, padded, `[labels, length]`, and the item."""
    histories, labels = [], []
    for batch in training_batches(data, [data.train], 4096, Order(range(1), 1, 1)):
        known = batch["known"].numpy()[:, np.newaxis]
        events = batch[history].numpy()[batch["sequence"].numpy()]
        # The latest events before the label, as the model sees them.
        place = np.arange(length) + np.maximum(known - length, 0)
        listed = np.take_along_axis(events, np.minimum(place, events.shape[1] - 1), axis=1)
        histories.append(np.where(place < known, listed, b"").astype("S"))
        labels.append(batch["label"].numpy().astype("S"))
    return {"history": np.concatenate(histories), "label": np.concatenate(labels)}


def _queries(data: PreparedData) -> dict[str, NDArray[np.bytes_]]:
    """The validation queries, of one label each, like `_examples`."""
    corpus = read_corpus(data)
    queries = read_interactions(data, data.validation, corpus)
    item = next(f for f in data.features.candidate if f.source_column == "item")
    # Rows of -1 stand for none.
    ids = np.append(np.array(corpus.features[item.name]), b"").astype("S")
    return {"history": ids[queries.history], "label": ids[queries.label]}


def _figures(clock: EpochClock, validate: object) -> dict[str, float]:
    validate()  # type: ignore[operator]
    begun = time.perf_counter()
    validate()  # type: ignore[operator]
    return {
        "epoch": float(np.mean(clock.seconds[1:])),
        "validation": time.perf_counter() - begun,
    }


SIDES = {"ours": ours, "tutorial": tutorial}


def measure(run: Path) -> dict[str, dict[str, float]]:
    """Seconds of both sides, the better of the rounds, each in a fresh process."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(ROUNDS):
        for side in SIDES:
            command = [sys.executable, __file__, str(run), "--side", side]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[side].append(json.loads(lines.splitlines()[-1]))
            print(side, found[side][-1], flush=True)
    return {
        side: {name: min(part[name] for part in parts) for name in parts[0]}
        for side, parts in found.items()
    }


def records(run: Path, data: PreparedData, device: str) -> Iterator[Record]:
    """Rates of both sides."""
    found = measure(run)
    command = f"python benchmarks/training_speed.py {run.name}"
    record = partial(Record, data=f"{run.name}, {device}", command=command)
    counts = {"epoch": ("labels", data.train), "validation": ("queries", data.validation)}
    for name, (unit, split) in counts.items():
        rates = {side: split.num_examples / found[side][name] for side in SIDES}
        yield record(
            what="training" if name == "epoch" else "ranking the whole corpus",
            metric=f"{unit}/s",
            value=rates["ours"],
            peer="TFRS's tutorial",
            peer_value=rates["tutorial"],
            target="several times" if name == "epoch" else "",
        )


def main() -> None:
    """Measure both sides, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run that was prepared")
    parser.add_argument("--side", choices=SIDES)
    arguments = parser.parse_args()
    run = arguments.run.absolute()
    config = RunConfig.model_validate_json((run / "config.json").read_text("utf-8"))
    data = PreparedData.load(run / "data")
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](config, data)))
        return
    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu)["device_name"] for gpu in gpus]
    device = details[0] if details else "CPU"
    made = list(records(run, data, device))
    replace("training_speed", made, lambda row: row["data"] == made[0].data)


if __name__ == "__main__":
    main()
