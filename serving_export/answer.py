"""Answer a request with exported models: run as a script, by a process without this package.

`python -I answer.py VARIANT=FOLDER ...` reads `request.npz` in the working directory and writes
`VARIANT.npz`. Imports only what a server has.
"""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf


def main(variants: list[str]) -> None:
    """Answer with each variant; those before `scann` must do without its ops."""
    with np.load("request.npz") as arrays:
        request = {name.removeprefix("input_"): tf.constant(arrays[name]) for name in arrays.files}
    for variant in variants:
        name, folder = variant.split("=", 1)
        if name == "scann":
            from scann.scann_ops.py import scann_ops  # noqa: F401  (registers the ops)
        answer = tf.saved_model.load(folder).signatures["recommend"](**request)
        outputs = {output: values.numpy() for output, values in answer.items()}
        np.savez(Path(f"{name}.npz"), **outputs | {"ids": outputs["ids"].astype(bytes)})


if __name__ == "__main__":
    main(sys.argv[1:])
