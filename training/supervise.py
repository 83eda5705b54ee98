"""Restart a launch that has lost workers; the launched function resumes by itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from recsys.config import Cluster
from training.attempt import WorkersLost

logger = logging.getLogger(__name__)

_LONGEST_WAIT = 300.0
T = TypeVar("T")


def supervise(attempt: Callable[[], T], cluster: Cluster) -> T:
    """Make attempts until one succeeds, `cluster.max_restarts` more than the first at most.

    The wait before a restart begins at `cluster.restart_seconds` and doubles each time.

    Raises:
        WorkersLost: the last attempt lost workers too; the message says which, where and how.
        Exception: whatever else an attempt raises, at once: it would raise it again.
    """
    for restarts in range(cluster.max_restarts + 1):
        try:
            return attempt()
        except WorkersLost as lost:
            if restarts == cluster.max_restarts:
                raise WorkersLost(
                    f"given up after {restarts} restarts (cluster.max_restarts): {lost}"
                ) from lost
            wait = min(cluster.restart_seconds * 2**restarts, _LONGEST_WAIT)
            logger.warning("restart %d in %.0f s: %s", restarts + 1, wait, lost)
            time.sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")
