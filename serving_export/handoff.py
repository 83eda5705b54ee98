"""Publish both variants of a model as the next version in a folder that servers poll.

`DIRECTORY/exact/N` and `DIRECTORY/scann/N` are SavedModels as TensorFlow Serving expects them. In
`assets.extra` of each:

- `contract.json`: schema, signatures, filters, index and its recall;
- `registered.json`: where the model came from;
- `tf_serving_warmup_requests`: requests that a server answers before it takes any;
- `examples/`: a request and its response as gRPC bytes, and as REST bodies by rows and columns.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

from recsys.artifacts import ArtifactError, PreparedData
from recsys.dataset import raw_batches
from serving_export import predict
from serving_export.unavailable import read_listing, with_listing
from serving_export.verify import ask
from serving_export.versions import REGISTERED, Superseded, VersionFolder

logger = logging.getLogger(__name__)

#: What the contract says of each filter, by feature name.
Filters = Mapping[str, Mapping[str, Any]]

#: What the configs in `server/` call a model; the examples ask for it.
SERVED_AS = "recommender"
VARIANTS = ("exact", "scann")

_EXTRA = "assets.extra"
_WARM_UP = f"{_EXTRA}/tf_serving_warmup_requests"
#: Sizes of the batches to warm up with, and numbers of items asked for.
_BATCHES = (1, 32)
_KS = (10, 100)
_EXAMPLE_QUERIES = 2
_EXAMPLE_K = 5
_EXAMPLE_OF = "recommend"


def publish(
    variants: Mapping[str, Path],
    data: PreparedData,
    registered: Mapping[str, str],
    directory: Path,
    keep: int,
) -> int:
    """Add the model to `directory` as its next version, and return the number.

    Before that, each variant answers the example request in a process of its own, and requests and
    responses are compared with its signatures. What the newest version takes for not available
    (`serving_export.availability`) the next one does too.

    Args:
        variants: SavedModel folders of `exact` and `scann`.
        data: whose first test queries are the requests; of the schema that the model has.
        registered: what the version is: `name`, `version` and more.
        directory: of the versions; see `VersionFolder`.
        keep: versions that stay.

    Raises:
        ArtifactError: model and data differ in their schema, a variant does not answer or answers
            otherwise than its signature says, the newest version has items that are not available
            and the model cannot be told so, or the directory cannot be written.
    """
    for variant in VARIANTS:
        _check_schema(variants[variant], data)
    queries = _queries(data, max(_BATCHES))
    folder = VersionFolder(directory, VARIANTS)
    while True:
        newest = folder.newest()
        with _as_available(variants, directory, newest) as offered:
            extras = _extras(offered, registered, queries)
            try:
                number = folder.add(offered, extras, keep, after=newest)
            except Superseded as error:
                # What is not available may have changed with it.
                logger.info("%s", error)
                continue
        logger.info("published %s as version %d of %s", registered["name"], number, directory)
        return number


@contextmanager
def _as_available(
    variants: Mapping[str, Path], directory: Path, newest: int
) -> Iterator[Mapping[str, Path]]:
    """Take over the newest version's list of what is not available."""
    listed = read_listing(directory / VARIANTS[0] / str(newest)) or []
    supported = all(read_listing(path) is not None for path in variants.values())
    if not listed and not supported:
        yield variants
    else:
        with with_listing(variants, listed) as offered:
            yield offered


def _extras(
    variants: Mapping[str, Path],
    registered: Mapping[str, str],
    queries: Mapping[str, NDArray[Any]],
) -> dict[str, dict[str, bytes]]:
    """Content of what a version has beside the SavedModel, by variant and path."""
    filters = _contract(variants[VARIANTS[0]]).get("filters", {})
    asked = _tensors(queries, _EXAMPLE_QUERIES, _EXAMPLE_K, filters, "frequent")
    extras = examples(variants, asked)
    for variant in VARIANTS:
        signatures = predict.read_signatures(variants[variant])
        told = json.dumps(dict(registered), indent=2).encode()
        extras[variant][REGISTERED] = told
        extras[variant][_WARM_UP] = _warm_up(signatures, queries, filters)
    return extras


def examples(variants: Mapping[str, Path], asked: predict.Tensors) -> dict[str, dict[str, bytes]]:
    """Ask each variant in a process of its own; content of the examples, by variant and path.

    Args:
        variants: SavedModel folders.
        asked: request of `recommend`.

    Raises:
        ArtifactError: a variant does not answer or answers otherwise than its signature says.
    """
    answers = ask(variants, asked)
    found = {}
    for variant, path in variants.items():
        signature = predict.read_signatures(path)[_EXAMPLE_OF]
        written = _examples(signature, asked, answers[variant])
        found[variant] = {f"{_EXTRA}/{file}": content for file, content in written.items()}
    return found


def withdraw(directory: Path) -> tuple[int, int]:
    """Take the newest version from servers; see `VersionFolder.withdraw`."""
    if not any((directory / variant).is_dir() for variant in VARIANTS):
        raise ArtifactError(f"{directory} holds no {' or '.join(VARIANTS)}: nothing is published")
    return VersionFolder(directory, VARIANTS).withdraw()


def _contract(variant: Path) -> dict[str, Any]:
    contract: dict[str, Any]
    contract = json.loads((variant / _EXTRA / "contract.json").read_text("utf-8"))
    return contract


def _check_schema(variant: Path, data: PreparedData) -> None:
    contract = _contract(variant)
    if contract["fingerprint"] != data.fingerprint:
        raise ArtifactError(
            f"the model in {variant} has another schema than {data.directory}, whose queries would "
            "warm it up: publish it with the run folder that it was made in"
        )


def _queries(data: PreparedData, count: int) -> dict[str, NDArray[Any]]:
    if not data.test.num_examples:
        raise ArtifactError(f"{data.directory} has no test queries to warm a server up with")
    first: dict[str, NDArray[Any]]
    first = next(iter(raw_batches(data, data.test, count).as_numpy_iterator()))
    return first


def _tensors(
    queries: Mapping[str, NDArray[Any]], size: int, k: int, filters: Filters, what: str
) -> dict[str, NDArray[Any]]:
    """Inputs of `recommend` for the first `size` queries, which filter by `what`."""
    rows = {name: values[:size] for name, values in queries.items()}
    size = len(next(iter(rows.values())))
    exclusions = np.full([size, 1], b"", object)
    asked = {f["input"]: np.array([_asked(f, what)] * size) for f in filters.values()}
    return rows | asked | {"exclusions": exclusions, "k": np.array(k, np.int32)}


def _asked(described: Mapping[str, Any], what: str) -> NDArray[Any]:
    """What one query asks of a filter: "all", what is "frequent", or "nothing" that there is."""
    if described["kind"] == "one_of":
        value = {"all": "", "frequent": described["frequent"][0], "nothing": "\n"}[what]
        return np.array([value.encode()], object)
    beyond = np.nextafter(np.float32(described["ends"][1]), np.float32(np.inf))
    ends = {"all": [np.nan] * 2, "frequent": described["ends"], "nothing": [beyond] * 2}
    return np.array(ends[what], np.float32)


def _warm_up(
    signatures: Mapping[str, SignatureDef],
    queries: Mapping[str, NDArray[Any]],
    filters: Filters,
) -> bytes:
    """Requests to every signature that takes queries, in the TFRecord format."""
    records = []
    # What filters pass nothing of is searched for in another part of the graph.
    for size, k, what in itertools.product(_BATCHES, _KS, ("all", "frequent", "nothing")):
        tensors = _tensors(queries, size, k, filters, what)
        for name, signature in sorted(signatures.items()):
            inputs = {n: v for n, v in tensors.items() if n in signature.inputs}
            if set(inputs) == set(signature.inputs):
                predict.check(signature.inputs, inputs, f"request of {name!r}")
                records.append(predict.warm_up(predict.request(SERVED_AS, name, inputs)))
    return _tfrecords(list(dict.fromkeys(records)))


def _tfrecords(records: list[bytes]) -> bytes:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "records"
        with tf.io.TFRecordWriter(str(file)) as writer:
            for record in records:
                writer.write(record)
        return file.read_bytes()


def _examples(
    signature: SignatureDef, asked: predict.Tensors, answered: predict.Tensors
) -> dict[str, bytes]:
    """Content of `examples/` by path."""
    predict.check(signature.inputs, asked, f"request of {_EXAMPLE_OF!r}")
    predict.check(signature.outputs, answered, f"response of {_EXAMPLE_OF!r}")
    request = predict.request(SERVED_AS, _EXAMPLE_OF, asked)
    response = predict.response(SERVED_AS, _EXAMPLE_OF, answered)
    examples = {
        "request.pb": request.SerializeToString(deterministic=True),
        "response.pb": response.SerializeToString(deterministic=True),
    }
    for form in ("rows", "columns"):
        body = predict.json_request(_EXAMPLE_OF, asked, form)
        examples[f"{form}.request.json"] = body.encode()
        examples[f"{form}.response.json"] = predict.json_response(answered, form).encode()
    return {f"examples/{name}": content for name, content in examples.items()}
