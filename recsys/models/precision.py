"""Mixed precision: layers that multiply in bfloat16 over variables in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tensorflow as tf


@contextmanager
def mixed_precision(enabled: bool) -> Iterator[None]:
    """Layers made in here compute in bfloat16, while their variables stay float32.

    Its range is that of float32, so that no loss has to be scaled. Keras reads the policy when a
    layer is made; it has no scope for it, only a global one.
    See https://www.tensorflow.org/guide/mixed_precision.
    """
    before = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16" if enabled else before)
    try:
        yield
    finally:
        tf.keras.mixed_precision.set_global_policy(before)
