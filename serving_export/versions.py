"""Numbered versions of a model in a folder that servers poll: added whole, withdrawn, pruned.

TensorFlow Serving takes every folder whose name is a number for a version, at any moment. So a
version is built under a name that is none, and gets its number by one rename.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recsys.artifacts import ArtifactError

#: File of a version that tells which registered model it holds.
REGISTERED = "assets.extra/registered.json"
_MODEL = "saved_model.pb"
_LOCK = ".lock"
_INCOMING = ".incoming"
_REMOVED = ".removed"
_WITHDRAWN = ".withdrawn-"
_COPY_BYTES = 1 << 20
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class Superseded(ArtifactError):
    """Another version was added meanwhile."""


@dataclass(frozen=True, slots=True)
class VersionFolder:
    """`DIRECTORY/VARIANT/NUMBER`: the variants of one model share their numbers.

    Every call can be killed at any moment and repeated; calls of several processes wait for each
    other. Killed between its renames, `add` leaves a whole version of one variant alone, which
    `versions` does not count and whose number the next one goes past. A number is never given
    twice, so a server that polls slowly cannot take one version for another. The folder must be on
    a file system with locks and atomic renames (local, NFS).

    Args:
        directory: made when missing.
        variants: names of the sub folders, such as `exact` and `scann`.
    """

    directory: Path
    variants: tuple[str, ...]

    def versions(self) -> list[int]:
        """Versions that every variant has, rising."""
        return sorted(set.intersection(*(self._visible(v) for v in self.variants)))

    def newest(self) -> int:
        """The newest version that every variant has, 0 where there is none."""
        return max(self.versions(), default=0)

    def add(
        self,
        sources: Mapping[str, Path],
        extras: Mapping[str, Mapping[str, bytes]],
        keep: int,
        after: int | None = None,
    ) -> int:
        """Copy the SavedModels of all variants in, as the next version, and return its number.

        Files of older versions are linked, not copied: nothing writes into a version.

        Args:
            sources: a SavedModel folder for each variant.
            extras: by variant, content of further files by their path in the version folder.
            keep: versions that stay, this one included; older ones are removed.
            after: what was the newest version when this one was made of it; any if None.

        Raises:
            Superseded: another version is the newest by now.
            ArtifactError: a source is no SavedModel, or the folder cannot be written.
        """
        for variant in self.variants:
            if not (sources[variant] / _MODEL).is_file():
                raise ArtifactError(f"{sources[variant]} is no SavedModel: it has no {_MODEL}")
        with self._locked():
            if after is not None and after != self.newest():
                raise Superseded(
                    f"{self.directory} has got version {self.newest()} since version {after} was "
                    "read: do it again"
                )
            staged = {v: self._stage(v, sources[v], extras[v]) for v in self.variants}
            number = 1 + max(self._taken(), default=0)
            for variant, folder in staged.items():
                folder.rename(self._folder(variant, number))
                _sync(self.directory / variant)
            for variant in self.variants:
                self._prune(variant, keep)
        return number

    def withdraw(self) -> tuple[int, int]:
        """Hide the newest version from servers, which return to the one before.

        Returns:
            The number that was withdrawn, and the newest one that is left.

        Raises:
            ArtifactError: there is no older version to return to.
        """
        with self._locked():
            newest = max((n for v in self.variants for n in self._visible(v)), default=None)
            if newest is None:
                raise ArtifactError(f"{self.directory} holds no version")
            holders = [v for v in self.variants if newest in self._visible(v)]
            for variant in holders:
                if self._visible(variant) == {newest}:
                    raise ArtifactError(
                        f"{self.directory / variant} holds version {newest} alone: there is no "
                        "older one that servers could return to"
                    )
            for variant in holders:
                hidden = self.directory / variant / f"{_WITHDRAWN}{newest}"
                self._folder(variant, newest).rename(hidden)
                _sync(self.directory / variant)
            return newest, max(self._visible(self.variants[0]))

    def _folder(self, variant: str, number: int) -> Path:
        return self.directory / variant / str(number)

    def _visible(self, variant: str) -> set[int]:
        found = (self.directory / variant).glob("*")
        return {int(path.name) for path in found if path.name.isdecimal() and path.is_dir()}

    def _withdrawn(self, variant: str) -> set[int]:
        found = (self.directory / variant).glob(f"{_WITHDRAWN}*")
        return {int(path.name.removeprefix(_WITHDRAWN)) for path in found}

    def _taken(self) -> set[int]:
        return {n for v in self.variants for n in self._visible(v) | self._withdrawn(v)}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be alone; what a killed process left is removed first, and on failure our own."""
        try:
            for variant in self.variants:
                (self.directory / variant).mkdir(parents=True, exist_ok=True)
            with (self.directory / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._sweep()
                try:
                    yield
                finally:
                    self._sweep()
        except OSError as error:
            raise ArtifactError(
                f"{error.filename or self.directory}: {error.strerror}. No half version is "
                "visible; the folder needs room, write permission and a file system with locks, "
                "such as a local disk or NFS"
            ) from error

    def _sweep(self) -> None:
        for name in (_INCOMING, _REMOVED):
            shutil.rmtree(self.directory / name, ignore_errors=True)

    def _stage(self, variant: str, source: Path, extras: Mapping[str, bytes]) -> Path:
        """Build a version under a name that servers overlook, `saved_model.pb` last."""
        staged = self.directory / _INCOMING / variant
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            name = file.relative_to(source)
            if str(name) not in (_MODEL, *extras):
                self._place(file.resolve(), staged / name)
        for relative, content in extras.items():
            _write(content, staged / relative)
        self._place((source / _MODEL).resolve(), staged / f".{_MODEL}")
        (staged / f".{_MODEL}").rename(staged / _MODEL)
        for folder in (staged, *(path for path in staged.rglob("*") if path.is_dir())):
            _sync(folder)
        return staged

    def _place(self, source: Path, target: Path) -> None:
        """Copy a file, or link one of an older version."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_relative_to(self.directory.resolve()):
            try:
                target.hardlink_to(source)
            except OSError as error:
                # Not every file system has links.
                if error.errno not in _NO_LINKS:
                    raise
            else:
                return
        _copy(source, target)

    def _model_of(self, variant: str, number: int) -> bytes | int:
        told = self._folder(variant, number) / REGISTERED
        return told.read_bytes() if told.is_file() else number

    def _prune(self, variant: str, keep: int) -> None:
        visible = sorted(self._visible(variant))
        kept = set(visible[-max(keep, 1) :])
        # Versions that differ in the list of available items alone push no earlier model out.
        newest_of = {self._model_of(variant, number): number for number in visible}
        kept.update(sorted(newest_of.values())[-max(keep, 1) :])
        old = [self._folder(variant, number) for number in visible if number not in kept]
        # A withdrawn version holds its number until a newer one does.
        old += [
            self.directory / variant / f"{_WITHDRAWN}{number}"
            for number in self._withdrawn(variant)
            if number < visible[-1]
        ]
        for folder in old:
            # Renamed first: a folder that is being deleted must not look like a version.
            removed = self.directory / _REMOVED / f"{variant}-{folder.name}"
            removed.parent.mkdir(exist_ok=True)
            folder.rename(removed)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("xb") as writing:
        shutil.copyfileobj(reading, writing, _COPY_BYTES)
        writing.flush()
        os.fsync(writing.fileno())


def _write(content: bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as writing:
        writing.write(content)
        writing.flush()
        os.fsync(writing.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
