"""Functions that tests launch on Spark; workers import them from a file that Spark sends along."""

import os
from pathlib import Path

import tensorflow as tf

from recsys.artifacts import Scoring
from training.callbacks import Checkpoints
from training.chief import from_chief, is_chief


def look_around(folder):
    """What a worker sees, one line each in a file; a manifest as the result."""
    strategy = tf.distribute.get_strategy()
    rank = strategy.cluster_resolver.task_id
    agreed = from_chief({"rank": float(rank), "pid": 7.0 if is_chief() else -1.0})
    lines = [
        f"replicas={strategy.num_replicas_in_sync}",
        f"agreed={agreed}",
        f"gpus={os.environ['CUDA_VISIBLE_DEVICES']}",
        f"secret={os.environ.get('MLFLOW_TRACKING_TOKEN')}",
    ]
    Path(folder, f"seen-{rank}").write_text("\n".join(lines))
    return Scoring(
        directory=Path(folder), destination="x", num_users=2, k=3, name="n", model_version="1"
    )


def restore_apart(folder):
    """Restore where the chief sees a damaged newest checkpoint, then where the other does."""
    rank = tf.distribute.get_strategy().cluster_resolver.task_id
    model = tf.keras.Sequential([tf.keras.layers.Dense(1, use_bias=False)])
    model.compile(optimizer=tf.keras.optimizers.Adagrad(0.1))
    model.build([None, 2])
    model.optimizer.build(model.trainable_variables)
    views = {0: ("damaged", "whole"), 1: ("whole", "damaged")}[rank]
    for round_, view in enumerate(views):
        state = Checkpoints(Path(folder, view), "ndcg@20", patience=9).restore(model)
        restored = f"{state.epoch} {model.get_weights()[0].ravel().tolist()}"
        Path(folder, f"restored-{round_}-{rank}").write_text(restored)
        from_chief({"here": 1.0})


def stumble(folder):
    """Rank 1 fails, rank 0 waits for it."""
    if tf.distribute.get_strategy().cluster_resolver.task_id == 1:
        raise KeyError("no such column")
    from_chief({"here": 1.0})
    return Scoring(
        directory=Path(folder), destination="x", num_users=2, k=3, name="n", model_version="1"
    )
