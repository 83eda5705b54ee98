"""When this process last got on with its work: a process may live and yet hang for ever."""

from __future__ import annotations

import time

_last = time.monotonic()


def advance() -> None:
    """Say that a piece of work is done, such as a training step."""
    global _last
    _last = time.monotonic()


def idle_seconds() -> float:
    """Seconds since the last piece of work, or since the process began."""
    return time.monotonic() - _last
