"""How long each epoch of a Keras training takes, by the clock and of processors."""

from __future__ import annotations

import time

import recsys  # noqa: F401  # isort: skip

import tensorflow as tf


class EpochClock(tf.keras.callbacks.Callback):
    """Seconds of each epoch in `seconds`, of this process's processors in `processor_seconds`."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        """Start the clock."""
        self._begun = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._begun[0])
        self.processor_seconds.append(time.process_time() - self._begun[1])
