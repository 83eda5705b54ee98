"""Restart a launch that has lost workers; the launched function resumes by itself."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from recsys.config import Cluster
from training.attempt import WorkersLost

logger = logging.getLogger(__name__)

_LONGEST_WAIT = 300.0
T = TypeVar("T")


def supervise(attempt: Callable[[], T], cluster: Cluster, saved: Callable[[], str]) -> T:
    """Make attempts until one succeeds, or `cluster.max_restarts` in a row have saved nothing new.

    The wait before a restart begins at `cluster.restart_seconds`, doubles each time, and begins
    anew after an attempt that got on.

    Args:
        attempt: what may lose workers.
        cluster: section of the config.
        saved: names what attempts have saved so far; greater after one that got on.

    Raises:
        WorkersLost: the last attempt lost workers too; the message says which, where and how.
        Exception: whatever else an attempt raises, at once: it would raise it again.
    """
    newest, in_vain = saved(), 0
    for restarts in itertools.count(1):
        try:
            return attempt()
        except WorkersLost as lost:
            before, newest = newest, max(newest, saved())
            in_vain = 0 if newest > before else in_vain
            if in_vain == cluster.max_restarts:
                raise WorkersLost(
                    f"given up after {in_vain} restarts in a row that saved nothing new "
                    f"(cluster.max_restarts): {lost}"
                ) from lost
            wait = min(cluster.restart_seconds * 2**in_vain, _LONGEST_WAIT)
            logger.warning("restart %d in %.0f s: %s", restarts, wait, lost)
            time.sleep(wait)
            in_vain += 1
    raise AssertionError("unreachable: attempts are made until one returns, or raises")
