"""A folder that is filled part by part, and that a later attempt goes on with after a kill."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from recsys.artifacts import ArtifactError

logger = logging.getLogger(__name__)

_PLAN = "plan.json"


@contextmanager
def resumed(directory: Path, plan: str) -> Iterator[Path]:
    """Yield a folder beside `directory` that takes its place when the block succeeds.

    It still holds what an earlier attempt with the same plan has left there, whether that failed or
    was killed; parts have to be written atomically. Another plan starts with an empty folder. What
    was in `directory` stays until then; where an attempt was killed as the one took the place of
    the other, the next brings it back.

    Args:
        directory: what is to be replaced as a whole.
        plan: text that says all that the parts depend on.

    Raises:
        ArtifactError: another process is filling the folder.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    old = directory.with_name(f".{directory.name}.old")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _PLAN).open("a+", encoding="utf-8") as file:
        _lock(file, partial)
        if old.exists() and not directory.exists():
            old.rename(directory)
        _tidy(directory, old)
        _begin(partial, file, plan)
        yield partial
        if directory.exists():
            directory.rename(old)
        partial.rename(directory)
        _tidy(directory, old)


def _lock(file: TextIO, partial: Path) -> None:
    """Keep others away until the file is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had the lock before may have moved the folder to its place.
        is_there = os.path.samestat(os.fstat(file.fileno()), (partial / _PLAN).stat())
    except (BlockingIOError, FileNotFoundError):
        is_there = False
    except OSError as error:
        logger.info("%s cannot be locked (%s): nobody else may fill it", partial, error)
        return
    if not is_there:
        raise ArtifactError(
            f"another process is filling {partial}: wait until it has finished, or stop it"
        )


def _tidy(directory: Path, old: Path) -> None:
    """Remove what only an attempt needs."""
    (directory / _PLAN).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


def _begin(partial: Path, file: TextIO, plan: str) -> None:
    """Empty the folder if it was filled by another plan."""
    file.seek(0)
    if file.read() == plan:
        return
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _PLAN:
            path.unlink()
    file.truncate(0)
    file.write(plan)
    file.flush()
