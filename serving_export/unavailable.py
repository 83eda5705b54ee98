"""Items that are not available now: a file of a SavedModel, read when the model is loaded.

The file is an asset that fills a lookup table, so the list changes without the graph, the weights
or the index: a copy of the model with another file is the model with another list.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from recsys.artifacts import ArtifactError
from recsys.atomic import write_atomically

#: No feature can be called so, hence no vocabulary's file is.
FILE = "unavailable-items.txt"
#: Place in a SavedModel.
ASSET = f"assets/{FILE}"
#: TensorFlow fills no table from an empty file.
#: Where a checkpoint of a served model keeps the ids of the candidates.
_IDS = "_ids/.ATTRIBUTES/VARIABLE_VALUE"
_FIRST_LINE = "# ids of items that are not available, one a line"


class Unavailable(tf.Module):
    """Knows which corpus rows hold an item that is not available.

    Args:
        file: the list, as `listing` makes it; a model that is saved takes it along.
        ids: of the items, bytes `[N]`.
    """

    def __init__(self, file: Path, ids: NDArray[np.object_]) -> None:
        super().__init__()
        whole, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
        initializer = tf.lookup.TextFileInitializer(str(file), tf.string, whole, tf.int64, number)
        self._table = tf.lookup.StaticHashTable(initializer, default_value=-1)
        self._ids = tf.Variable(tf.constant(ids, tf.string), trainable=False, name="ids")

    def share(self) -> tf.Tensor:
        """Share of the corpus that is not available, float32 `[]`; above it if ids are unknown."""
        listed = tf.cast(self._table.size() - 1, tf.float32)
        return tf.minimum(listed / tf.cast(tf.size(self._ids), tf.float32), 1.0)

    def among(self, rows: tf.Tensor) -> tf.Tensor:
        """Which corpus rows are not available, bool of the shape of `rows`."""
        return tf.cond(
            self._table.size() > 1,
            lambda: self._table.lookup(tf.gather(self._ids, rows)) >= 0,
            lambda: tf.zeros_like(rows, tf.bool),
        )


def read_items(file: Path, column: str) -> list[str]:
    """Ids of items in a CSV file with a header, in their order.

    Raises:
        ArtifactError: there is no such file, it lacks the column, or holds no id or an empty one.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if column not in (reader.fieldnames or ()):
                raise ArtifactError(
                    f"{file}: expected a CSV file with a header and a column {column!r}, found "
                    f"{list(reader.fieldnames or ()) or 'an empty file'}"
                )
            items = [_id(row[column], f"{file}, line {reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{file} is no readable CSV file in UTF-8: {error}") from error
    if not items:
        raise ArtifactError(
            f"{file} lists no item, which looks like a mistake: `recsys availability --clear`, or "
            "a config without `scoring.unavailable`, makes all items available again"
        )
    return items


def write_items(file: Path, column: str, items: Iterable[str]) -> None:
    """Write ids as `read_items` reads them."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([column])
        writer.writerows([item] for item in items)


def _id(value: str | None, place: str) -> str:
    if not value or "\n" in value:
        raise ArtifactError(f"{place}: expected the id of an item, found {value!r}")
    return value


def listing(items: Iterable[str]) -> str:
    """Content of the file for these ids."""
    return "\n".join([_FIRST_LINE, *dict.fromkeys(items), ""])


def read_listing(model: Path) -> list[str] | None:
    """Ids that a SavedModel takes for not available; None if it was exported without a list."""
    file = model / ASSET
    return file.read_text("utf-8").split("\n")[1:-1] if file.is_file() else None


def write_listing(model: Path, items: Iterable[str]) -> None:
    """Give a SavedModel another list; who has loaded it does not notice.

    Raises:
        ArtifactError: it was exported without a list.
    """
    _check_takes_list(model)
    write_atomically(model / ASSET, listing(items))


def _check_takes_list(model: Path) -> None:
    if read_listing(model) is None:
        raise ArtifactError(
            f"{model} cannot be told what is not available: it was exported without "
            "`export.availability`: `recsys export --run-dir RUN --set export.availability=true` "
            "exports the trained model anew, then `register` and `promote` it"
        )


class Listed(NamedTuple):
    """A list beside the items of a model: how many it has, how many are listed, unknown ids."""

    num_items: int
    num_unavailable: int
    unknown: tuple[str, ...]


def compared(model: Path, items: Iterable[str], name: str) -> Listed:
    """Compare a list with the items of a SavedModel, without loading it.

    Raises:
        ArtifactError: no item would be left.
    """
    checkpoint = tf.train.load_checkpoint(str(model / "variables" / "variables"))
    variable = next(n for n in checkpoint.get_variable_to_shape_map() if n.endswith(_IDS))
    candidates = {item.decode() for item in checkpoint.get_tensor(variable).tolist()}
    listed = set(items)
    if candidates <= listed:
        raise ArtifactError(
            f"all {len(candidates)} items of {name} are listed as not available: nothing would be "
            "left to recommend"
        )
    unknown = tuple(sorted(listed - candidates))
    return Listed(len(candidates), len(candidates & listed), unknown)


@contextmanager
def with_listing(models: Mapping[str, Path], items: Iterable[str]) -> Iterator[dict[str, Path]]:
    """Yield SavedModels like these, by the same names, with another list; links, for a while.

    Raises:
        ArtifactError: a model was exported without a list.
    """
    for model in models.values():
        _check_takes_list(model)
    with TemporaryDirectory() as folder:
        linked = {name: Path(folder) / name for name in models}
        for name, model in models.items():
            _link_all(model.resolve(), linked[name])
            # Replaces the link, not what it leads to.
            write_listing(linked[name], items)
        yield linked


def _link_all(source: Path, target: Path) -> None:
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        link = target / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
