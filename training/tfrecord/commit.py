"""Writing a directory so that a reader sees all of a job or nothing of it.

Tasks write to a hidden sibling of the target. On commit an overwrite renames the finished
directory over: the old one is moved aside, and removed only after the new one stands. An
append renames its files in while a journal that lists them makes readers look past them; the
removal of the journal is the commit. So a kill at any moment leaves the old data readable.

Leftovers of killed jobs are removed by the next commit to the same target. That includes the
staging of a job which still runs: one target takes one writer at a time, and the commit of
the other fails, without harm to what is there.

The target must not be a mount point: its siblings have to be on the same file system.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.tfrecord.errors import TFRecordError
from training.tfrecord.paths import (
    DISPLACED,
    JOURNAL,
    SIDECAR,
    STAGING,
    displaced,
    journaled,
    journals,
    visible_files,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StagedPart:
    """The output of one attempt of one task.

    Attributes:
        partition: index of the partition.
        attempt: id of the attempt, unique in the job.
        extension: such as ``.tfrecord.gz``.
    """

    partition: int
    attempt: int
    extension: str

    @property
    def staged_name(self) -> str:
        """Name while staged: attempts of one partition do not collide."""
        return f"part-{self.partition:05d}-attempt-{self.attempt}{self.extension}"

    def final_name(self, unique: str) -> str:
        """Name in the target; ``unique`` keeps appends apart."""
        return f"part-{self.partition:05d}{unique}{self.extension}"


@dataclass(frozen=True)
class WriteJob:
    """One job that writes to one directory.

    Attributes:
        target: absolute path of the directory.
        job: id that no other job has.
        overwrite: whether to replace what is there, else to add to it.
    """

    target: Path
    job: str
    overwrite: bool

    @property
    def staging(self) -> Path:
        """Hidden sibling of the target that all files of the job are in until it commits."""
        return self._sibling(STAGING)

    def prepare(self) -> None:
        """Create the staging directory, on the driver.

        Tasks do not: one that starts after the job was aborted must not bring it back, and
        one on a node without this file system must not write to a directory of its own.
        """
        self._attempts.mkdir(parents=True)

    def staged_path(self, part: StagedPart) -> Path:
        """Return where an attempt writes.

        Raises:
            TFRecordError: the staging directory is not there.
        """
        if not self._attempts.is_dir():
            raise TFRecordError(
                f"{self._attempts}: expected the job's staging directory, it is not there: another "
                f"job has committed to {self.target} meanwhile (run one writer at a time), this "
                "job was aborted, or the path is not mounted on every node."
            )
        return self._attempts / part.staged_name

    def commit(self, parts: Sequence[StagedPart], sidecar: str) -> None:
        """Make the parts visible, all at once, and remove what killed jobs left.

        Args:
            parts: the attempts that count, one per partition with data.
            sidecar: content of the ``_schema.json`` file.

        Raises:
            TFRecordError: a staged file is gone.
            OSError: a rename or write failed; call ``abort``.
        """
        self._check_staged(parts)
        _restore(self.target)
        if self.target.exists():
            for journal in journals(self.target):
                _roll_back(journal)
        if self.overwrite or not self.target.exists():
            self._replace(parts, sidecar)
        else:
            self._append(parts, sidecar)
        for leftover in (*displaced(self.target), *self._all_staging()):
            _remove(leftover)

    def abort(self) -> None:
        """Remove everything this job has staged or begun to add."""
        _restore(self.target)
        own = self.target / JOURNAL.format(job=self.job)
        if own.exists():
            _roll_back(own)
        # Renamed after another job's commit had already rolled the journal back.
        for stray in self.target.glob(f"part-*-{self.job}.*"):
            stray.unlink()
        if self.staging.exists():
            _remove(self.staging)

    def _sibling(self, template: str) -> Path:
        return self.target.parent / template.format(name=self.target.name, job=self.job)

    def _all_staging(self) -> list[Path]:
        prefix = STAGING.format(name=self.target.name, job="")
        return [path for path in self.target.parent.iterdir() if path.name.startswith(prefix)]

    @property
    def _attempts(self) -> Path:
        return self.staging / "attempts"

    def _check_staged(self, parts: Sequence[StagedPart]) -> None:
        for part in parts:
            path = self.staged_path(part)
            if not path.exists():
                raise TFRecordError(
                    f"{path}: expected the staged file of partition {part.partition}, it is not "
                    "there, though its task has ended: is the path on shared storage? Nothing "
                    f"was changed in {self.target}."
                )

    def _replace(self, parts: Sequence[StagedPart], sidecar: str) -> None:
        # Not the directory tasks write to: a late attempt must not find its way in.
        ready = self.staging / "ready"
        ready.mkdir()
        for part in parts:
            self.staged_path(part).rename(ready / part.final_name(""))
        _put(ready / SIDECAR, sidecar)
        _put(ready / "_SUCCESS", "")
        _sync(ready)
        aside = self._sibling(DISPLACED)
        if self.target.exists():
            self.target.rename(aside)
        ready.rename(self.target)
        _sync(self.target.parent)

    def _append(self, parts: Sequence[StagedPart], sidecar: str) -> None:
        moves = {part.final_name(f"-{self.job}"): self.staged_path(part) for part in parts}
        if not visible_files(self.target) and not (self.target / SIDECAR).exists():
            moves[SIDECAR] = self.staging / SIDECAR
            _put(moves[SIDECAR], sidecar)
        journal = self.target / JOURNAL.format(job=self.job)
        begun = self.staging / "journal"
        _put(begun, json.dumps({"files": sorted(moves)}))
        begun.rename(journal)
        _sync(self.target)
        for name, staged in moves.items():
            staged.rename(self.target / name)
        _put(self.target / "_SUCCESS", "")
        _sync(self.target)
        journal.unlink()
        _sync(self.target)


def _restore(target: Path) -> None:
    """Undo a swap that was killed between its two renames."""
    old = displaced(target)
    if old and not target.exists():
        _log.warning("%s: restoring what a killed overwrite had moved to %s", target, old[0])
        old[0].rename(target)


def _roll_back(journal: Path) -> None:
    """Remove the files of an append that did not commit, then its journal."""
    _log.warning("%s: removing the files of an append that did not finish", journal)
    for name in journaled(journal):
        (journal.parent / name).unlink(missing_ok=True)
    _sync(journal.parent)
    journal.unlink()


def _put(path: Path, text: str) -> None:
    """Write a small file and force it to disk."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} while committing", str(path)) from error


def _sync(directory: Path) -> None:
    """Force renames in a directory to disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(directory: Path) -> None:
    """Remove a hidden leftover; failing to is no reason to fail what has been committed."""
    try:
        shutil.rmtree(directory)
    except OSError as error:
        _log.warning("%s: could not be removed, remove it by hand: %s", directory, error)
