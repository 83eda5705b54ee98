"""Which files hold the training sequences, and which worker reads which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from recsys.artifacts import ArtifactError, PreparedData, Sequences

#: So much more than the mean may the worker read that reads most.
_UNEVEN = 1.1
_MIB = 2**20

#: What a process cuts its share of a batch out of: a table in memory, what it reads from its own
#: files each epoch, or what it reads from all files.
Reading = Literal["table", "own files", "all files"]


class Share(NamedTuple):
    """Which part of each global batch a process feeds to its replicas.

    Attributes:
        replicas: numbers of its replicas among all.
        total: replicas of all processes, each of which has as many.
    """

    replicas: range
    total: int

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return self.total // len(self.replicas)

    @property
    def process(self) -> int:
        """Number of this one."""
        return self.replicas.start // len(self.replicas)

    def within_process(self) -> Share:
        """Return the part of what this process has of a batch."""
        return Share(range(len(self.replicas)), len(self.replicas))


#: Of the only replica that there is.
WHOLE = Share(range(1), 1)


@dataclass(frozen=True, slots=True)
class Shards:
    """Files of training sequences.

    Attributes:
        files: in order.
        num_sequences: of each file; empty where the manifest does not tell.
    """

    files: tuple[str, ...]
    num_sequences: tuple[int, ...]

    @classmethod
    def of(cls, data: PreparedData, splits: Sequence[Sequences]) -> Shards:
        """Files of these splits; their manifest counts what is in them."""
        files = tuple(file for split in splits for file in data.files(split))
        counts = tuple(count for split in splits for count in split.sequences_by_file)
        return cls(files, counts if len(counts) == len(files) else ())

    def reading(self, processes: int, cache_mib: int) -> Reading:
        """Choose how so many processes read the files.

        Small ones become a table that each process holds (tf.data's DATA sharding). Of larger ones
        each of several processes reads its own (FILE) if they can be dealt out evenly, else all.
        Batches depend on the first question alone: they stay the same when workers are lost.

        Raises:
            ArtifactError: they are not small, and the manifest does not tell what is in which.
        """
        if sum(Path(file).stat().st_size for file in self.files) <= cache_mib * _MIB:
            return "table"
        if not self.num_sequences:
            raise ArtifactError(
                f"{Path(self.files[0]).parent}: the training files exceed train.cache_mib="
                f"{cache_mib}, and their manifest does not tell how many sequences each of them "
                "holds: run `recsys prepare` again, or raise train.cache_mib"
            )
        loads = [sum(self.num_sequences[n] for n in own) for own in self._dealt(processes)]
        even = processes > 1 and min(loads) > 0 and max(loads) * processes <= _UNEVEN * sum(loads)
        return "own files" if even else "all files"

    def own(self, share: Share) -> list[int]:
        """Numbers of the files that a process reads where each has its own."""
        return sorted(self._dealt(share.processes)[share.process])

    def _dealt(self, processes: int) -> list[list[int]]:
        """Deal out the files, the largest first, each to whom has least."""
        hands: list[list[int]] = [[] for _ in range(processes)]
        loads = [0] * processes
        for number in sorted(range(len(self.files)), key=lambda n: (-self.num_sequences[n], n)):
            least = loads.index(min(loads))
            hands[least].append(number)
            loads[least] += self.num_sequences[number]
        return hands
