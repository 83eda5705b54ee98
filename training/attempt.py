"""One attempt of a launch: the shared folder by which its driver and its workers talk.

Workers leave signs of life, logs, failures and the result; the driver leaves word that it has given
the attempt up, so that a worker that was frozen does not go on once it wakes.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from recsys.atomic import write_atomically

_ABANDONED = "abandoned"
_RESULT = "result.pickle"
#: A worker says so once it has nothing more to do, and needs no sign of life after it.
DONE = "done"
#: Said for a worker that has died by who starts it again, which may take a while.
STARTING = "starting"


class WorkersLost(RuntimeError):
    """Workers died, froze, or lost each other or the storage; another attempt may succeed."""


class WorkerError(RuntimeError):
    """The launched function raised in a worker; another attempt would fail alike."""


FailureKind = Literal["error", "peer", "lost", "outage"]


class Failure(BaseModel):
    """How a worker ended.

    Attributes:
        kind: `error`: the function raised. `peer`: a collective broke, as another worker is gone.
            `lost`: the process died or froze. `outage`: storage, network or a device failed it.
        message: one line.
        trace: of the worker, where it could tell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: FailureKind
    rank: int
    host: str
    log: Path
    message: str
    trace: str = ""

    def __str__(self) -> str:
        place = f"{self.log}:{_num_lines(self.log)}"
        return f"worker {self.rank} on {self.host}: {self.message} (log {place})"


class Attempt:
    """The folder of one attempt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def next_in(cls, folder: Path) -> Attempt:
        """Begin the attempt after those that the folder holds, all of which are given up."""
        earlier = sorted(folder.glob("attempt-*"))
        for path in earlier:
            cls(path).abandon()
        number = int(earlier[-1].name.removeprefix("attempt-")) + 1 if earlier else 1
        attempt = cls(folder / f"attempt-{number:04d}")
        attempt.folder.mkdir(parents=True)
        return attempt

    def log(self, rank: int) -> Path:
        """File that takes all that a worker prints."""
        return self.folder / f"rank-{rank}.log"

    def note_host(self, rank: int, host: str) -> None:
        """Note where a worker runs, for the day that it cannot say so itself."""
        # A full disk is not to end what it does not hinder.
        with suppress(OSError):
            self._host(rank).write_text(host, "utf-8")

    def host(self, rank: int) -> str:
        """Where a worker runs, as far as that was noted."""
        with suppress(OSError):
            return self._host(rank).read_text("utf-8") or "an unknown host"
        return "an unknown host"

    def _host(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.host"

    def give_sign(self, rank: int, sign: str) -> None:
        """Leave a sign of life, other than the last."""
        temporary = self.folder / f".rank-{rank}.alive"
        # Not forced to disk as artifacts are: that may take seconds when the disk is busy.
        temporary.write_text(sign, "utf-8")
        temporary.replace(self._signs(rank))

    def sign(self, rank: int) -> str:
        """Last sign of life, empty before the first."""
        try:
            return self._signs(rank).read_text("utf-8")
        except FileNotFoundError:
            return ""

    def _signs(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.alive"

    def abandon(self) -> None:
        """Tell its workers to end."""
        (self.folder / _ABANDONED).touch()

    def is_abandoned(self) -> bool:
        """Whether the driver has given it up."""
        return (self.folder / _ABANDONED).exists()

    def succeed(self, result: object) -> None:
        """Leave the result; done by the chief."""
        temporary = self.folder / f".{_RESULT}.{os.getpid()}"
        temporary.write_bytes(pickle.dumps(result))
        temporary.replace(self.folder / _RESULT)

    def is_finished(self) -> bool:
        """Whether the chief has left the result."""
        return (self.folder / _RESULT).is_file()

    def result(self) -> Any:
        """Read the result.

        Raises:
            WorkersLost: there is none.
        """
        file = self.folder / _RESULT
        if not self.is_finished():
            raise WorkersLost(f"all workers have ended, but the chief left no {file}")
        return pickle.loads(file.read_bytes())

    def fail(self, failure: Failure) -> None:
        """Note how a worker failed, unless it has said so itself."""
        file = self.folder / f"rank-{failure.rank}.failure.json"
        if not file.exists():
            write_atomically(file, failure.model_dump_json(indent=2))

    def note_restart(self, rank: int, told: str) -> None:
        """Note in its log that a worker has died, and starts again while the others go on."""
        self.give_sign(rank, STARTING)
        with self.log(rank).open("a", encoding="utf-8") as log:
            log.write(f"worker {rank}: {told}; it starts again\n")

    def failures(self) -> list[Failure]:
        """What is noted of the workers so far, by rank."""
        return [
            Failure.model_validate_json(file.read_bytes())
            for file in sorted(self.folder.glob("rank-*.failure.json"))
        ]

    def diagnosis(self, told: str) -> WorkersLost | WorkerError:
        """Find the cause among the failures of the workers; `told` is what Spark says."""
        failures = self.failures()
        kinds: tuple[FailureKind, ...] = ("lost", "error", "outage", "peer")
        by_kind = {k: [failure for failure in failures if failure.kind == k] for k in kinds}
        # Whoever saw a worker die may have raised anything; so the dead come first.
        cause = next((found for found in by_kind.values() if found), [])
        if cause and cause[0].kind == "error":
            return WorkerError(f"{cause[0]}\n{cause[0].trace}")
        return WorkersLost(_listed(cause) or told)


def _listed(failures: Sequence[Failure]) -> str:
    return "; ".join(str(failure) for failure in failures)


def _num_lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.is_file() else 0
