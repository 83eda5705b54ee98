"""Publish both variants of a model as the next version in a folder that servers poll.

`DIRECTORY/exact/N` and `DIRECTORY/scann/N` are SavedModels as TensorFlow Serving expects them. In
`assets.extra` of each:

- `contract.json`: schema, signatures, index and its recall;
- `registered.json`: where the model came from;
- `tf_serving_warmup_requests`: requests that a server answers before it takes any;
- `examples/`: a request and its response as gRPC bytes, and as REST bodies by rows and columns.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
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
from serving_export.verify import ask
from serving_export.versions import VersionFolder

logger = logging.getLogger(__name__)

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
    responses are compared with its signatures.

    Args:
        variants: SavedModel folders of `exact` and `scann`.
        data: whose first test queries are the requests; of the schema that the model has.
        registered: what the version is: `name`, `version` and more.
        directory: of the versions; see `VersionFolder`.
        keep: versions that stay.

    Raises:
        ArtifactError: model and data differ in their schema, a variant does not answer or answers
            otherwise than its signature says, or the directory cannot be written.
    """
    for variant in VARIANTS:
        _check_schema(variants[variant], data)
    queries = _queries(data, max(_BATCHES))
    example = _tensors(queries, _EXAMPLE_QUERIES, _EXAMPLE_K)
    answers = ask({variant: variants[variant] for variant in VARIANTS}, example)
    extras = {}
    for variant in VARIANTS:
        signatures = predict.read_signatures(variants[variant])
        found = _examples(registered["name"], signatures[_EXAMPLE_OF], example, answers[variant])
        found["registered.json"] = json.dumps(dict(registered), indent=2).encode()
        extras[variant] = {f"{_EXTRA}/{name}": content for name, content in found.items()}
        extras[variant][_WARM_UP] = _warm_up(registered["name"], signatures, queries)
    number = VersionFolder(directory, VARIANTS).add(variants, extras, keep)
    logger.info("published %s as version %d of %s", registered["name"], number, directory)
    return number


def withdraw(directory: Path) -> tuple[int, int]:
    """Take the newest version from servers; see `VersionFolder.withdraw`."""
    if not any((directory / variant).is_dir() for variant in VARIANTS):
        raise ArtifactError(f"{directory} holds no {' or '.join(VARIANTS)}: nothing is published")
    return VersionFolder(directory, VARIANTS).withdraw()


def _check_schema(variant: Path, data: PreparedData) -> None:
    contract = json.loads((variant / _EXTRA / "contract.json").read_text("utf-8"))
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


def _tensors(queries: Mapping[str, NDArray[Any]], size: int, k: int) -> dict[str, NDArray[Any]]:
    """Inputs of `recommend` for the first `size` queries."""
    rows = {name: values[:size] for name, values in queries.items()}
    exclusions = np.full([len(next(iter(rows.values()))), 1], b"", object)
    return rows | {"exclusions": exclusions, "k": np.array(k, np.int32)}


def _warm_up(
    model: str, signatures: Mapping[str, SignatureDef], queries: Mapping[str, NDArray[Any]]
) -> bytes:
    """Requests to every signature that takes queries, in the TFRecord format."""
    records = []
    for size in _BATCHES:
        for k in _KS:
            tensors = _tensors(queries, size, k)
            for name, signature in sorted(signatures.items()):
                inputs = {n: v for n, v in tensors.items() if n in signature.inputs}
                if set(inputs) == set(signature.inputs):
                    predict.check(signature.inputs, inputs, f"request of {name!r}")
                    records.append(predict.warm_up(predict.request(model, name, inputs)))
    return _tfrecords(list(dict.fromkeys(records)))


def _tfrecords(records: list[bytes]) -> bytes:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "records"
        with tf.io.TFRecordWriter(str(file)) as writer:
            for record in records:
                writer.write(record)
        return file.read_bytes()


def _examples(
    model: str, signature: SignatureDef, asked: predict.Tensors, answered: predict.Tensors
) -> dict[str, bytes]:
    """Content of `examples/` by path."""
    predict.check(signature.inputs, asked, f"request of {_EXAMPLE_OF!r}")
    predict.check(signature.outputs, answered, f"response of {_EXAMPLE_OF!r}")
    request = predict.request(model, _EXAMPLE_OF, asked)
    response = predict.response(model, _EXAMPLE_OF, answered)
    examples = {
        "request.pb": request.SerializeToString(deterministic=True),
        "response.pb": response.SerializeToString(deterministic=True),
    }
    for form in ("rows", "columns"):
        body = predict.json_request(_EXAMPLE_OF, asked, form)
        examples[f"{form}.request.json"] = body.encode()
        examples[f"{form}.response.json"] = predict.json_response(answered, form).encode()
    return {f"examples/{name}": content for name, content in examples.items()}
