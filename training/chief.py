"""The chief among the workers of a training: who writes, and how the others learn what it knows."""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def is_chief() -> bool:
    """Whether this process writes to shared storage; true without other workers."""
    resolver = tf.distribute.get_strategy().cluster_resolver
    return resolver is None or not resolver.task_id


def from_chief(values: dict[str, float]) -> dict[str, float]:
    """Return the chief's values on every worker, all of which must call this.

    Args:
        values: of this worker, by names that all workers have in the same order; only the chief's
            are used.
    """
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
