"""A training process of its own beside its Spark task: `python -m training.worker ATTEMPT RANK`.

The task's own Python process may be reused by Spark, while TensorFlow joins a cluster once in the
life of a process. What to call comes pickled by standard input, the cluster in `TF_CONFIG`.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

import recsys  # noqa: F401  (sets the environment that TensorFlow reads)
from training.attempt import DONE, Attempt, Failure

#: Seconds between signs of life.
BEAT_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Call the function under the strategy of all workers; exit with 1 if it fails."""
    attempt, rank = Attempt(Path(sys.argv[1])), int(sys.argv[2])
    _die_with_the_task()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s")
    over = threading.Event()
    living = threading.Thread(target=_live, args=[attempt, rank, over], daemon=True)
    living.start()
    try:
        result = _call()
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        attempt.fail(_failure(error, attempt, rank))
        sys.exit(1)
    if rank == 0:
        attempt.succeed(result)
    over.set()
    living.join()
    # The end of the process may take a while: it lets go of the others.
    attempt.give_sign(rank, DONE)


def _call() -> object:
    import tensorflow as tf

    for device in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, True)
    # Before anything else that TensorFlow does.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    fn, args = pickle.load(sys.stdin.buffer)
    with strategy.scope():
        return fn(*args)


def _failure(error: BaseException, attempt: Attempt, rank: int) -> Failure:
    from tensorflow import errors

    gone = (
        errors.UnavailableError,
        errors.AbortedError,
        errors.CancelledError,
        errors.DeadlineExceededError,
    )
    text = str(error).strip().split("\n", 1)[0]
    return Failure(
        kind="peer" if isinstance(error, gone) else "error",
        rank=rank,
        host=socket.gethostname(),
        log=attempt.log(rank),
        message=f"{type(error).__name__}: {text}",
        trace=traceback.format_exc(),
    )


def _live(attempt: Attempt, rank: int, over: threading.Event) -> None:
    """Give signs of life until it is over, and end when the driver has given the attempt up."""
    beats = itertools.count()
    while not over.is_set():
        try:
            if attempt.is_abandoned():
                os._exit(1)
            attempt.give_sign(rank, str(next(beats)))
        except OSError as error:
            # Shared storage may be away for a moment; the driver decides for how long.
            logging.warning("no sign of life: %s", error)
        over.wait(BEAT_SECONDS)


def _die_with_the_task() -> None:
    """Have Linux kill this process with the Spark task that started it, also while frozen."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
