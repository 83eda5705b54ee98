"""What can go wrong in `prepare`, said so that a person can act on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DISK_FULL = ("No space left on device", "Not enough space", "ENOSPC", "Disk quota exceeded")
# Names, not classes: this module answers before Spark is imported.
_EXPRESSION_FAILED = (
    "ArithmeticException",
    "ArrayIndexOutOfBoundsException",
    "DateTimeException",
    "NumberFormatException",
)


class PrepareError(RuntimeError):
    """The data cannot be prepared; the message names the table, column or key to change."""


class LeakError(PrepareError):
    """Something that training learns from lies at or after what it is tested on."""


@contextmanager
def explained(directory: Path, scratch: str) -> Iterator[None]:
    """Turn what Spark reports of a full disk or a failed expression into one sentence.

    Args:
        directory: folder that is written to.
        scratch: folder of Spark's shuffle and spill files, which may be the full one.

    Raises:
        PrepareError: a write failed for want of space, or an expression of the config on a value.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ in _EXPRESSION_FAILED:
            raise PrepareError(
                "an SQL expression of the config (derive, query, cleaning.drop) fails on a value: "
                f"{str(error).splitlines()[0]} Use try_cast or another try_ function there"
            ) from error
        if not any(sign in _chain(error) for sign in _DISK_FULL):
            raise
        raise PrepareError(
            f"no space left on device while writing {directory}: "
            f"{_free(directory)} free there, {_free(Path(scratch))} free in Spark's scratch folder "
            f"{scratch} (cluster.spark, key spark.local.dir); free some space and run again"
        ) from error


def _chain(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def _free(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:,.0f} MiB"
