"""TensorFlow Serving's Predict API: requests and responses as protos (gRPC) and JSON (REST).

Formats: tensorflow.org/tfx/serving/api_rest and `tensorflow_serving/apis/predict.proto`. Tensors
are arrays by name; strings are bytes or bytes objects. The JSON of a server holds NaN and Infinity
as bare words, which Python's `json` reads and writes too, and strict readers refuse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef, TensorInfo
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog, PredictLog

from recsys.artifacts import ArtifactError

Tensors = Mapping[str, NDArray[Any]]
#: REST: one object for each query (`instances`), or one array for each input (`inputs`).
Format = Literal["rows", "columns"]


def read_signatures(folder: Path) -> dict[str, SignatureDef]:
    """Signatures of a SavedModel by name, without loading it."""
    model = SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    found = model.meta_graphs[0].signature_def
    return {name: found[name] for name in found if not name.startswith("__")}


def check(expected: Mapping[str, TensorInfo], tensors: Tensors, what: str) -> None:
    """Compare tensors with the inputs or outputs of a signature.

    Args:
        expected: `inputs` or `outputs` of a signature.
        tensors: arrays by name.
        what: begins the message, such as "request of `recommend`".

    Raises:
        ArtifactError: a name is missing or too many, or a type or shape differs.
    """
    if set(expected) != set(tensors):
        raise ArtifactError(f"{what}: expected {sorted(expected)}, found {sorted(tensors)}")
    for name, info in expected.items():
        proto = _proto(tensors[name])
        shape = tf.TensorShape(info.tensor_shape)
        found = tf.TensorShape(proto.tensor_shape)
        if proto.dtype != info.dtype or not shape.is_compatible_with(found):
            raise ArtifactError(
                f"{what}: {name!r} is expected as {tf.as_dtype(info.dtype).name} {shape}, found "
                f"{tf.as_dtype(proto.dtype).name} {found}"
            )


def request(model: str, signature: str, tensors: Tensors) -> PredictRequest:
    """Make the request of a gRPC `Predict` call."""
    made = PredictRequest()
    made.model_spec.name = model
    made.model_spec.signature_name = signature
    for name, values in tensors.items():
        made.inputs[name].CopyFrom(_proto(values))
    return made


def response(model: str, signature: str, tensors: Tensors) -> PredictResponse:
    """Make the response to a gRPC `Predict` call."""
    made = PredictResponse()
    made.model_spec.name = model
    made.model_spec.signature_name = signature
    for name, values in tensors.items():
        made.outputs[name].CopyFrom(_proto(values))
    return made


def warm_up(request: PredictRequest) -> bytes:
    """Make one record of `assets.extra/tf_serving_warmup_requests`."""
    log = PredictionLog(predict_log=PredictLog(request=request))
    record: bytes = log.SerializeToString(deterministic=True)
    return record


def json_request(signature: str, tensors: Tensors, form: Format) -> str:
    """Make the body of a REST `:predict` call; rows repeat what is one value for all queries."""
    columns = {name: _plain(values) for name, values in tensors.items()}
    if form == "columns":
        body: dict[str, Any] = {"inputs": columns}
    else:
        size = max(len(values) for values in tensors.values() if np.ndim(values))
        lists = {n: v if isinstance(v, list) else [v] * size for n, v in columns.items()}
        body = {"instances": _rows(lists, size)}
    return json.dumps({"signature_name": signature} | body, ensure_ascii=False, indent=1)


def json_response(tensors: Tensors, form: Format) -> str:
    """Make the body of the answer to a REST `:predict` call of the same form."""
    columns = {name: _plain(values) for name, values in tensors.items()}
    if form == "columns":
        return json.dumps({"outputs": columns}, ensure_ascii=False, indent=1)
    rows = _rows(columns, len(next(iter(columns.values()))))
    return json.dumps({"predictions": rows}, ensure_ascii=False, indent=1)


def _rows(columns: Mapping[str, list[Any]], size: int) -> list[dict[str, Any]]:
    return [{name: values[row] for name, values in columns.items()} for row in range(size)]


def _proto(values: NDArray[Any]) -> tf.core.framework.tensor_pb2.TensorProto:
    array = np.asarray(values)
    return tf.make_tensor_proto(array.astype(object) if array.dtype.kind == "S" else array)


def _plain(values: NDArray[Any]) -> Any:
    """Nested lists, or one value; bytes as the UTF-8 text that they are."""
    array = np.asarray(values)
    if array.dtype.kind in "SO":
        array = np.frompyfunc(bytes.decode, 1, 1)(array.astype(object))
    return array.tolist() if isinstance(array, np.ndarray) else array
