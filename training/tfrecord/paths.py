"""What a reader sees: from the ``path`` option to the data files that are really there.

Names that begin with ``_`` or ``.`` are never data. A directory may hold leftovers of a
killed writer (see ``commit``); they are hidden by such names, or listed in a journal.
"""

from __future__ import annotations

import glob
import json
import logging
import re
from pathlib import Path
from urllib.parse import unquote

from training.tfrecord.errors import TFRecordError

JOURNAL = "_append-{job}.json"
"""While this file is in a directory, the files it lists are not there for a reader."""

STAGING = ".{name}.staging-{job}"
"""Sibling of the target in which a job prepares its files."""

DISPLACED = ".{name}.displaced-{job}"
"""Sibling that holds the old target for the moment between the two renames of a swap."""

SIDECAR = "_schema.json"
"""File beside the data that holds the Spark schema they were written with."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_FILE_URI = re.compile(r"file:(//(localhost)?)?(?=/)")

_HIDDEN = ("_", ".")

_log = logging.getLogger(__name__)


def local_path(text: str | None) -> Path:
    """Return the absolute path that the ``path`` option names.

    Raises:
        TFRecordError: there is none, or it is the URI of another file system.
    """
    if not text:
        raise TFRecordError("expected one path, got none: use .load(path) or .save(path).")
    if _FILE_URI.match(text):
        return Path(unquote(_FILE_URI.sub("", text, count=1)))
    scheme = _SCHEME.match(text)
    if scheme:
        raise TFRecordError(
            f"{text}: expected a path of a mounted file system or a file: URI, got the scheme "
            f"{scheme[1]!r}: use the path under which the storage is mounted on every node, such "
            "as /Volumes/<catalog>/<schema>/<volume>/... or /dbfs/..."
        )
    return Path(text).absolute()


def data_files(text: str | None) -> tuple[list[Path], list[Path]]:
    """List the files that the ``path`` option of a read selects.

    Args:
        text: a directory, a file, or a glob pattern of either, as a path or ``file:`` URI.

    Returns:
        The directories whose sidecars describe the data, and the data files; both sorted.

    Raises:
        TFRecordError: nothing is there, a directory has neither data nor a schema, or a
            directory has subdirectories.
    """
    asked = local_path(text)
    literal = asked.exists() or not glob.has_magic(str(asked))
    chosen = [_standing_in_for(asked)] if literal else _expand(asked)
    directories = {path if path.is_dir() else path.parent for path in chosen}
    visible = {directory: visible_files(directory) for directory in directories}
    files = set[Path]()
    for path in chosen:
        if path.is_dir():
            files.update(_all_of(path, visible[path]))
        elif path in visible[path.parent]:
            files.add(path)
    if not files and not any(path.is_dir() for path in chosen):
        raise _missing(asked)
    return sorted(directories), sorted(files)


def _all_of(directory: Path, visible: set[Path]) -> set[Path]:
    nested = sorted(path for path in visible if path.is_dir())
    if nested:
        raise TFRecordError(
            f"{directory}: expected only files, found the directory {nested[0].name!r}: "
            f"subdirectories are not searched, name them with a pattern such as {directory}/*/"
        )
    if not visible and not (directory / SIDECAR).exists():
        raise TFRecordError(
            f"{directory}: expected TFRecord files, found an empty directory (names that begin "
            "with _ or . and unfinished appends do not count): check the path, or write first."
        )
    return visible


def visible_files(directory: Path) -> set[Path]:
    """Return what of a directory is data, and its visible subdirectories.

    Left out are hidden names, and the files of appends which have not committed. The listing
    is repeated until nothing changes, for it must not mix the states before and after a
    commit that happens meanwhile.
    """
    while True:
        names = _names(directory)
        try:
            pending = {name for journal in journals(directory) for name in journaled(journal)}
        except FileNotFoundError:
            continue
        if names == _names(directory):
            return {directory / n for n in names - pending if not n.startswith(_HIDDEN)}


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def journals(directory: Path) -> list[Path]:
    """Return the journals of appends that run or were killed in this directory."""
    return sorted(directory.glob(JOURNAL.format(job="*")))


def journaled(journal: Path) -> list[str]:
    """Return the file names a journal lists.

    Raises:
        TFRecordError: it is not a journal.
    """
    try:
        names: list[str] = json.loads(journal.read_text(encoding="utf-8"))["files"]
    except (KeyError, TypeError, ValueError) as error:
        raise TFRecordError(
            f"{journal}: expected the journal of an append, JSON with 'files', got {error!r}: "
            "something else wrote this file; move it away if it is not of this data source."
        ) from error
    return names


def displaced(target: Path) -> list[Path]:
    """Return the old targets that swaps have moved aside and not (yet) removed."""
    return sorted(target.parent.glob(DISPLACED.format(name=glob.escape(target.name), job="*")))


def _standing_in_for(path: Path) -> Path:
    """Return the path, or what a swap that was killed half-way has left of it."""
    if path.exists():
        return path
    old = displaced(path)
    if not old:
        raise _missing(path)
    _log.warning("%s was being overwritten when its writer died: reading %s", path, old[0])
    return old[0]


def _expand(pattern: Path) -> list[Path]:
    fixed = 0
    while not glob.has_magic(pattern.parts[fixed]):
        fixed += 1
    found = [Path(match) for match in glob.glob(str(pattern))]  # noqa: PTH207 absolute pattern
    shown = [p for p in found if not any(x.startswith(_HIDDEN) for x in p.parts[fixed:])]
    if not shown:
        raise _missing(pattern)
    return shown


def _missing(path: Path) -> TFRecordError:
    return TFRecordError(
        f"{path}: expected a TFRecord file, a directory of them or a glob pattern that matches "
        "some, found nothing: check the path, and that every node has it mounted."
    )
