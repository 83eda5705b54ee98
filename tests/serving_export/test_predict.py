import json
import math

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from recsys.artifacts import ArtifactError
from serving_export import predict


@pytest.fixture(scope="module")
def signatures(world):
    return predict.read_signatures(world.exported.directory / "exact")


@pytest.fixture(scope="module")
def tensors(tiny):
    """Two queries, of which one knows nothing; bytes as TFRecords give them."""
    item = tiny.item(3).encode()
    return {
        "history": np.array([[item, b""], [b"", b""]], object),
        "member": np.array([b"user 1", b""], object),
        "country": np.array([b"dk", b""], object),
        "basket": np.array([1.5, math.nan], np.float32),
        "clicked_at": np.array([1_600_000_000, -1]),
        "taste": np.array([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]], np.float32),
        "k": np.int32(4),
        "exclusions": np.array([[b""], [tiny.item(0).encode()]], object),
    }


def answer(world, inputs):
    outputs = world.models["exact"].signatures["recommend"](
        **{name: tf.constant(values) for name, values in inputs.items()}
    )
    return {name: values.numpy() for name, values in outputs.items()}


def as_a_server_reads(body, inputs):
    """JSON to tensors by the rules of TensorFlow Serving's json_tensor.cc, types by signature."""
    body = json.loads(body)
    columns = body.get("inputs")
    if columns is None:
        columns = {n: [row[n] for row in body["instances"]] for n in body["instances"][0]}
        assert all(set(row) == set(inputs) for row in body["instances"])
    return {
        name: np.array(value, tf.as_dtype(inputs[name].dtype).as_numpy_dtype)
        for name, value in columns.items()
    }


def test_signatures_are_those_of_the_model(signatures, world):
    assert set(signatures) == set(world.models["exact"].signatures)
    assert set(signatures["recommend"].outputs) == {"ids", "scores"}


def test_grpc_bytes_are_what_the_signature_takes_and_gives(signatures, world, tensors):
    predict.check(signatures["recommend"].inputs, tensors, "request")
    sent = predict.request("tiny", "recommend", tensors).SerializeToString()
    got = PredictRequest.FromString(sent)
    assert (got.model_spec.name, got.model_spec.signature_name) == ("tiny", "recommend")
    inputs = {name: tf.make_ndarray(proto) for name, proto in got.inputs.items()}
    outputs = answer(world, inputs)
    np.testing.assert_array_equal(outputs["ids"], answer(world, tensors)["ids"])
    predict.check(signatures["recommend"].outputs, outputs, "response")
    reply = PredictResponse.FromString(
        predict.response("tiny", "recommend", outputs).SerializeToString()
    )
    np.testing.assert_array_equal(tf.make_ndarray(reply.outputs["ids"]), outputs["ids"])
    np.testing.assert_array_equal(tf.make_ndarray(reply.outputs["scores"]), outputs["scores"])


def test_a_warm_up_record_holds_the_request(tensors):
    made = predict.request("tiny", "recommend", tensors)
    log = PredictionLog.FromString(predict.warm_up(made))
    assert log.predict_log.request == made


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_both_rest_formats_ask_the_same(signatures, world, tensors, form):
    inputs = signatures["recommend"].inputs
    body = predict.json_request("recommend", tensors, form)
    read = as_a_server_reads(body, inputs)
    predict.check(inputs, read, "request")
    assert read["k"].shape == (() if form == "columns" else (2,))
    expected, outputs = answer(world, tensors), answer(world, read)
    np.testing.assert_array_equal(outputs["ids"], expected["ids"])
    np.testing.assert_allclose(outputs["scores"], expected["scores"], rtol=1e-6)


def test_rest_answers_are_rows_or_columns(world, tensors, tiny):
    outputs = answer(world, tensors)
    rows = json.loads(predict.json_response(outputs, "rows"))["predictions"]
    columns = json.loads(predict.json_response(outputs, "columns"))["outputs"]
    assert [row["ids"] for row in rows] == columns["ids"]
    assert columns["ids"][1] == [tiny.item(n) for n in (1, 2, 3, 4)]
    assert columns["scores"] == outputs["scores"].tolist()
    nothing = {"ids": np.array([[b""]], object), "scores": np.array([[-math.inf]], np.float32)}
    assert '"scores": [\n    -Infinity' in predict.json_response(nothing, "rows")


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("basket", np.array(["1.5", ""], object), "'basket' is expected as float32 .*found string"),
        ("member", np.array([[b"user 1"]], object), r"'member'.*string \(None,\), found.*\(1, 1\)"),
        ("taste", np.zeros([2, 4], np.float32), r"'taste'.*\(None, 3\), found float32 \(2, 4\)"),
        ("k", np.int64(3), "'k' is expected as int32 .*found int64"),
    ],
)
def test_what_does_not_fit_the_signature_is_named(signatures, tensors, name, values, told):
    with pytest.raises(ArtifactError, match=f"request: {told}"):
        predict.check(signatures["recommend"].inputs, tensors | {name: values}, "request")


def test_missing_and_strange_inputs_are_named(signatures, tensors):
    fewer = {name: values for name, values in tensors.items() if name != "k"}
    with pytest.raises(ArtifactError, match=r"request: expected \['basket'.*'k'.*found \['basket'"):
        predict.check(signatures["recommend"].inputs, fewer, "request")
