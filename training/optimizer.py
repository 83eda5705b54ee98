"""The optimizer of the towers, with its schedule."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from recsys.model_config import Train


def optimizer(train: Train, steps_per_epoch: int) -> tf.keras.optimizers.Optimizer:
    """Make the optimizer with its schedule; a schedule ends with the last of `train.epochs`."""
    rate: float | tf.keras.optimizers.schedules.LearningRateSchedule = train.learning_rate
    if train.schedule == "cosine" or train.warmup_steps:
        last = 0.0 if train.schedule == "cosine" else 1.0
        rate = tf.keras.optimizers.schedules.CosineDecay(
            0.0 if train.warmup_steps else train.learning_rate,
            decay_steps=max(1, train.epochs * steps_per_epoch - train.warmup_steps),
            alpha=last,
            warmup_target=train.learning_rate if train.warmup_steps else None,
            warmup_steps=train.warmup_steps,
        )
    # On a GPU Keras compiles updates by XLA, which fails at sparse ones of deterministic training.
    settings: dict[str, Any] = {
        "learning_rate": rate,
        "global_clipnorm": train.clip_norm,
        "jit_compile": False,
    }
    if train.optimizer == "adagrad":
        return tf.keras.optimizers.Adagrad(**settings)
    return tf.keras.optimizers.Adam(weight_decay=train.weight_decay or None, **settings)
