"""The chief among the workers of a training: who writes, and how the others learn what it knows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import tensorflow as tf

T = TypeVar("T")


def is_chief() -> bool:
    """Whether this process writes to shared storage; true without other workers."""
    resolver = tf.distribute.get_strategy().cluster_resolver
    return resolver is None or not resolver.task_id


def coordinator() -> tf.distribute.coordinator.ClusterCoordinator | None:
    """What the chief deals out steps by, if parameter servers hold the variables."""
    strategy = tf.distribute.get_strategy()
    if not isinstance(strategy, tf.distribute.ParameterServerStrategy):
        return None
    # There is one of each strategy: this gives the same again.
    return tf.distribute.coordinator.ClusterCoordinator(strategy)


def wait_for_steps() -> None:
    """Return once all steps that were begun are done; with parameter servers they go on beside."""
    dealt_by = coordinator()
    if dealt_by is not None:
        dealt_by.join()


def without_strategy(fn: Callable[[], T]) -> T:
    """Call it as a process would that trains alone: its variables are here and in one piece."""
    # A strategy is in scope in one thread, and cannot be left but by another.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fn).result()


def from_chief(values: dict[str, float]) -> dict[str, float]:
    """Return the chief's values on every worker, all of which must call this.

    Args:
        values: of this worker, by names that all workers have in the same order; only the chief's
            are used.
    """
    if coordinator() is not None:
        return values
    strategy = tf.distribute.get_strategy()
    mine = tf.constant(list(values.values()), tf.float64)

    def first(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
        return mine if context.replica_id_in_sync_group == 0 else tf.zeros_like(mine)

    by_replica = strategy.experimental_distribute_values_from_function(first)
    agreed = np.asarray(strategy.reduce(tf.distribute.ReduceOp.SUM, by_replica, axis=None))
    return {name: float(value) for name, value in zip(values, agreed, strict=True)}


def wait_for_chief() -> None:
    """Return once all workers are here: what the chief has written before is then there."""
    from_chief({"here": 1.0})
