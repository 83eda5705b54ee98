"""Training with parameter servers: they hold the variables, workers take steps, each at its pace.

The chief alone runs `fit`. It reads the batches and deals them out, each to a worker that is free,
so that a record is seen once an epoch however fast its workers are, and the batch of a worker that
has died goes to another.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from training.chief import coordinator

logger = logging.getLogger(__name__)

#: A smaller table costs more to ask several servers for than it weighs.
_SHARD_BYTES = 16 << 10
#: A table has more rows by far than columns; the kernel of a layer has not, and is read as a whole.
_ROWS_TO_A_COLUMN = 8
#: Steps that are dealt out before they are asked for, to each worker.
_AHEAD = 4
#: Calls from one process to another hold a thread of TensorFlow's while they wait; on two cores it
#: would have two, and with all of them waiting nothing ever goes on.
_SPARE_THREADS = 8


def strategy() -> tf.distribute.ParameterServerStrategy:
    """Connect the chief to the servers and workers that `TF_CONFIG` names.

    Tables are divided over all servers by rows; other variables go to one server each in turn.
    """
    # It tells of every wait, at each checkpoint.
    tf.get_logger().setLevel(logging.WARNING)
    # Or a chief would wait for a server that is gone.
    os.environ["GRPC_FAIL_FAST"] = "use_caller"
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver(rpc_layer="grpc")
    tf.config.threading.set_inter_op_parallelism_threads(_threads(resolver))
    servers = resolver.cluster_spec().num_tasks("ps")
    return tf.distribute.ParameterServerStrategy(resolver, variable_partitioner=tables(servers))


def tables(servers: int) -> Callable[..., list[int]]:
    """Make the rule that says, by shape and type of a variable, into how many parts it goes."""
    by_size = tf.distribute.experimental.partitioners.MinSizePartitioner(_SHARD_BYTES, servers)

    def parts(shape: tf.TensorShape, dtype: tf.DType, **settings: Any) -> list[int]:
        if shape.rank == 2 and shape[0] >= _ROWS_TO_A_COLUMN * shape[1]:
            return list(by_size(shape, dtype, **settings))
        return [1] * shape.rank

    return parts


def serve() -> tf.distribute.Server:
    """Start to do what the chief says, as the server or worker that `TF_CONFIG` makes of us."""
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    settings = tf.compat.v1.ConfigProto(inter_op_parallelism_threads=_threads(resolver))
    settings.gpu_options.allow_growth = True
    return tf.distribute.Server(
        resolver.cluster_spec(),
        job_name=resolver.task_type,
        task_index=resolver.task_id,
        protocol="grpc",
        config=settings,
    )


def _threads(resolver: tf.distribute.cluster_resolver.ClusterResolver) -> int:
    cluster = resolver.cluster_spec()
    return _SPARE_THREADS + sum(cluster.num_tasks(job) for job in cluster.jobs)


def batches(
    model: tf.keras.Model, make: Callable[[tf.distribute.InputContext], tf.data.Dataset]
) -> Any:
    """Return what `model.fit` trains on: the data set of each process, or what its chief deals out.

    Args:
        model: with parameter servers, its `train_step` is called on workers with an element.
        make: makes the data set of a process.
    """
    strategy, dealt_by = tf.distribute.get_strategy(), coordinator()
    if dealt_by is None:
        return strategy.distribute_datasets_from_function(make)
    _tell_placement(model)
    model.train_function = _dealer(model, make(tf.distribute.InputContext()), dealt_by)

    def nothing(context: tf.distribute.InputContext) -> tf.data.Dataset:
        # Keras wants each worker to read for itself.
        return tf.data.Dataset.range(1).repeat()

    return tf.keras.utils.experimental.DatasetCreator(nothing)


def _dealer(
    model: tf.keras.Model,
    dataset: tf.data.Dataset,
    dealt_by: tf.distribute.coordinator.ClusterCoordinator,
) -> Callable[[Any], Any]:
    """Make the function by which Keras takes a step: it hands the next batch to a worker.

    It returns before the step is done, but not before all but the last few are: what is dealt out
    waits in the memory of the chief.
    """
    strategy = tf.distribute.get_strategy()
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    most = _AHEAD * resolver.cluster_spec().num_tasks("worker")
    elements, begun = iter(dataset), deque[Any]()

    @tf.function(input_signature=[dataset.element_spec])
    def step(batch: Any) -> Any:
        return strategy.run(model.train_step, (batch,))

    def deal(_: Any) -> Any:
        if len(begun) == most:
            begun.popleft().fetch()
        begun.append(dealt_by.schedule(step, args=(next(elements),)))
        return begun[-1]

    return deal


def _tell_placement(model: tf.keras.Model) -> None:
    held, parts = Counter[str](), Counter[str]()
    for variable in model.variables:
        held[variable.device] += variable.shape.num_elements() * variable.dtype.size
        name, part, _ = variable.name.partition("/part_")
        parts[name] += bool(part)
    sizes = ", ".join(f"{size / 1e6:.2f} MB" for _, size in sorted(held.items()))
    divided = [f"{name} in {number}" for name, number in parts.items() if number]
    logger.info("servers hold %s; divided: %s", sizes, ", ".join(divided) or "nothing")
