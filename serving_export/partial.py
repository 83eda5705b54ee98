"""A folder that is filled part by part, and that a later attempt goes on with after a kill."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recsys.atomic import write_atomically

_PLAN = "plan.json"


@contextmanager
def resumed(directory: Path, plan: str) -> Iterator[Path]:
    """Yield a folder beside `directory` that takes its place when the block succeeds.

    It still holds what an earlier attempt with the same plan has left there, whether that failed or
    was killed; parts have to be written atomically. Another plan starts with an empty folder.

    Args:
        directory: what is to be replaced as a whole.
        plan: text that says all that the parts depend on.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if not _has(partial, plan):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_atomically(partial / _PLAN, plan)
    yield partial
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    (directory / _PLAN).unlink()
    shutil.rmtree(old, ignore_errors=True)


def _has(folder: Path, plan: str) -> bool:
    file = folder / _PLAN
    return file.is_file() and file.read_text(encoding="utf-8") == plan
