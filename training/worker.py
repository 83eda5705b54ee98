"""A training process beside its Spark task: `python -m training.worker ATTEMPT RANK PATIENCE`.

The task's own Python process may be reused by Spark, while TensorFlow joins a cluster once in the
life of a process. What to call comes pickled by standard input, the cluster in `TF_CONFIG`. Where
that has parameter servers, they and the workers do what the chief says, who alone makes the call.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import itertools
import json
import logging
import math
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import recsys  # noqa: F401  (sets the environment that TensorFlow reads)
from training import parameter_server
from training.attempt import DONE, Attempt, Failure, FailureKind
from training.progress import idle_seconds

#: Seconds between signs of life.
BEAT_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_WHERE = re.compile(r"Graph execution error:|Detected at node |  File |\d+ root error")


def main() -> None:
    """Call the function under the strategy of all tasks; exit with 1 if it fails."""
    attempt, rank, patience = Attempt(Path(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3])
    cluster, job = _place()
    if job != _calling(cluster):
        # What serves has no steps of its own.
        patience = math.inf
    _die_with_the_task()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s")
    over = threading.Event()
    living = threading.Thread(target=_live, args=[attempt, rank, patience, over], daemon=True)
    living.start()
    try:
        result = _call(attempt)
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
    if "ps" in cluster:
        # For minutes, if one of them is gone.
        logging.shutdown()
        os._exit(0)


def _place() -> tuple[dict[str, list[str]], str]:
    """Addresses of all tasks by job, and the job of this one."""
    place = json.loads(os.environ["TF_CONFIG"])
    return place["cluster"], place["task"]["type"]


def _calling(cluster: dict[str, list[str]]) -> str:
    return "chief" if "ps" in cluster else "worker"


def _call(attempt: Attempt) -> object:
    import tensorflow as tf

    for device in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, True)
    cluster, job = _place()
    if job != _calling(cluster):
        _serve(attempt)
        return None
    # Before anything else that TensorFlow does.
    with_servers = "ps" in cluster
    strategy = (
        parameter_server.strategy() if with_servers else tf.distribute.MultiWorkerMirroredStrategy()
    )
    fn, args = pickle.load(sys.stdin.buffer)
    with strategy.scope():
        return fn(*args)


def _serve(attempt: Attempt) -> None:
    """Do what the chief says until it has left the result."""
    parameter_server.serve()
    while True:
        with suppress(OSError):
            if attempt.is_finished():
                return
        time.sleep(BEAT_SECONDS)


def _failure(error: BaseException, attempt: Attempt, rank: int) -> Failure:
    return Failure(
        kind=failure_kind(error),
        rank=rank,
        host=socket.gethostname(),
        log=attempt.log(rank),
        message=f"{type(error).__name__}: {_told(error)}",
        trace=traceback.format_exc(),
    )


def _told(error: BaseException) -> str:
    """First line of what happened; TensorFlow begins with where in the code it did."""
    lines = filter(str.strip, str(error).splitlines())
    return next((line.strip() for line in lines if not _WHERE.match(line)), "")


def failure_kind(error: BaseException) -> FailureKind:
    """Tell what another attempt may mend, an outage or a lost peer, from an error of the code.

    An error that was raised from another is of the other's kind, unless that is an `error`. Tried
    again in vain, an outage ends the launch too, after `cluster.max_restarts`.
    """
    from tensorflow import errors

    match error:
        case (
            errors.UnavailableError()
            | errors.AbortedError()
            | errors.CancelledError()
            | errors.DeadlineExceededError()
        ):
            return "peer"
        # What devices, drivers and file systems fail with. OOM, of the same code, comes again.
        case errors.InternalError() | errors.UnknownError():
            return "outage"
        case errors.ResourceExhaustedError() if os.strerror(errno.ENOSPC) in str(error):
            return "outage"
        # A path or a URL that is wrong stays so.
        case FileNotFoundError() | FileExistsError() | PermissionError() | ValueError():
            return "error"
        case IsADirectoryError() | NotADirectoryError():
            return "error"
        # The disk, the network, and all that `requests` raises.
        case OSError():
            return "outage"
    return failure_kind(error.__cause__) if error.__cause__ else "error"


def _live(attempt: Attempt, rank: int, patience: float, over: threading.Event) -> None:
    """Give signs of life until it is over, the driver gives the attempt up, or nothing gets on."""
    beats = itertools.count()
    while not over.is_set():
        try:
            if attempt.is_abandoned():
                os._exit(1)
            if idle_seconds() > patience:
                _end_stuck(attempt, rank)
            attempt.give_sign(rank, str(next(beats)))
        except OSError as error:
            # Shared storage may be away for a moment; the driver decides for how long.
            logging.warning("no sign of life: %s", error)
        over.wait(BEAT_SECONDS)


def _end_stuck(attempt: Attempt, rank: int) -> None:
    """End this process, which hangs, and leave word of where: all its stacks are in the log."""
    faulthandler.dump_traceback()
    told = f"no step or validation batch for {idle_seconds():.0f} s"
    attempt.fail(
        Failure(
            kind="lost",
            rank=rank,
            host=socket.gethostname(),
            log=attempt.log(rank),
            message=f"{told} (cluster.progress_timeout_seconds), its stacks are in the log",
        )
    )
    os._exit(1)


def _die_with_the_task() -> None:
    """Have Linux kill this process with the Spark task that started it, also while frozen."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
