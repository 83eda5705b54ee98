"""Files and folders that are replaced as a whole, whatever happens meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    """Replace a text file as a whole, surviving a kill at any moment."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


@contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """Yield an empty folder beside `directory` that takes its place when the block succeeds.

    What was in `directory` stays until then. An error removes the new folder; what a killed
    process left of one is removed by the next call, or takes its place if it was to do so.
    """
    new = directory.with_name(f".{directory.name}.new")
    old = directory.with_name(f".{directory.name}.old")
    if old.exists() and not directory.exists():
        # Killed between the renames: the new folder is whole.
        (new if new.exists() else old).rename(directory)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
    except BaseException:
        if old.exists() and not directory.exists():
            old.rename(directory)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
