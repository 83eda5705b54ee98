"""Tell servers which items are not available now: the newest version again, with another list.

Nothing is trained, embedded or indexed, and no file but the list and the examples is written: all
others are links to those of the version before. Servers load it as they load any version.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf
from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse

from recsys.artifacts import ArtifactError
from serving_export.handoff import VARIANTS, examples
from serving_export.unavailable import compared, with_listing
from serving_export.versions import VersionFolder

logger = logging.getLogger(__name__)

_EXTRA = "assets.extra"


class Availability(NamedTuple):
    """A version with its list: its number, items it has, how many are listed, ids it has not."""

    version: int
    num_items: int
    num_unavailable: int
    unknown: tuple[str, ...]


def publish_availability(directory: Path, items: Sequence[str], keep: int) -> Availability:
    """Publish the newest version again, with `items` as those that are not available.

    Before that, both variants answer the example request in a process of their own.

    Args:
        directory: of the versions; see `serving_export.versions.VersionFolder`.
        items: ids, all that are not available now; those the model does not know are counted.
        keep: versions that stay.

    Raises:
        Superseded: another version was published meanwhile.
        ArtifactError: nothing is published, the model was exported without
            `export.availability: true`, or no item would be left.
    """
    folder = VersionFolder(directory, VARIANTS)
    newest = folder.newest()
    if not newest:
        raise ArtifactError(f"{directory} holds no version of {' and '.join(VARIANTS)}")
    models = {variant: directory / variant / str(newest) for variant in VARIANTS}
    listed = compared(models[VARIANTS[0]], items, f"version {newest} in {directory}")
    with with_listing(models, items) as changed:
        asked = PredictRequest.FromString(_example(models[VARIANTS[0]], "request.pb"))
        tensors = {name: tf.make_ndarray(value) for name, value in asked.inputs.items()}
        extras = examples(changed, tensors)
        for variant, content in extras.items():
            _check(content[f"{_EXTRA}/examples/response.pb"], items, variant)
        number = folder.add(changed, extras, keep, after=newest)
    logger.info("version %d of %s is version %d with another list", number, directory, newest)
    return Availability(number, *listed)


def _example(model: Path, name: str) -> bytes:
    return (model / _EXTRA / "examples" / name).read_bytes()


def _check(response: bytes, items: Iterable[str], variant: str) -> None:
    answered = tf.make_ndarray(PredictResponse.FromString(response).outputs["ids"])
    returned = {item.decode() for item in answered.ravel().tolist()}.intersection(items)
    if returned:
        raise ArtifactError(
            f"the {variant} SavedModel still returns {sorted(returned)[:3]}, which are listed as "
            "not available"
        )
