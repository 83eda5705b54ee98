import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import yaml
from google.protobuf import text_format
from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

import serving_export
from recsys.artifacts import ArtifactError
from serving_export.handoff import VARIANTS, publish, withdraw

REGISTERED = {"name": "tiny", "version": "7", "run_id": "abc"}
SERVER = Path(serving_export.__file__).parent / "server"


@pytest.fixture(scope="module")
def published(variants, data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    assert publish(variants, data, REGISTERED, directory, keep=2) == 1
    return directory


@pytest.fixture(scope="module")
def served(published):
    """What a server would load."""
    return {name: tf.saved_model.load(str(published / name / "1")) for name in VARIANTS}


def call(model, request):
    inputs = {name: tf.constant(tf.make_ndarray(t)) for name, t in request.inputs.items()}
    return model.signatures[request.model_spec.signature_name](**inputs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_version_has_all_that_a_server_and_its_people_read(published, variant):
    extra = published / variant / "1" / "assets.extra"
    assert sorted(str(p.relative_to(extra)) for p in extra.rglob("*") if p.is_file()) == [
        "contract.json",
        "examples/columns.request.json",
        "examples/columns.response.json",
        "examples/request.pb",
        "examples/response.pb",
        "examples/rows.request.json",
        "examples/rows.response.json",
        "registered.json",
        "tf_serving_warmup_requests",
    ]
    assert json.loads((extra / "registered.json").read_text()) == REGISTERED


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_warm_up_asks_for_all_that_queries_are_asked_for(published, served, variant):
    file = published / variant / "1" / "assets.extra" / "tf_serving_warmup_requests"
    logs = [PredictionLog.FromString(r.numpy()) for r in tf.data.TFRecordDataset(str(file))]
    requests = [log.predict_log.request for log in logs]
    assert {(r.model_spec.name, r.model_spec.signature_name) for r in requests} == {
        ("recommender", "recommend"), ("recommender", "serving_default"), ("recommender", "embed_query"),
    }  # fmt: skip
    sizes = {tf.make_ndarray(r.inputs["member"]).size for r in requests}
    assert sizes == {1, 32}
    for request in requests:
        answer = call(served[variant], request)
        size = tf.make_ndarray(request.inputs["member"]).size
        assert all(len(values) == size for values in answer.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_examples_are_true(published, served, variant):
    examples = published / variant / "1" / "assets.extra" / "examples"
    request = PredictRequest.FromString((examples / "request.pb").read_bytes())
    response = PredictResponse.FromString((examples / "response.pb").read_bytes())
    answer = call(served[variant], request)
    ids = tf.make_ndarray(response.outputs["ids"])
    np.testing.assert_array_equal(ids, answer["ids"].numpy())
    np.testing.assert_allclose(
        tf.make_ndarray(response.outputs["scores"]), answer["scores"].numpy(), rtol=1e-5
    )
    told = json.loads((examples / "rows.response.json").read_text())["predictions"]
    assert [row["ids"] for row in told] == [[i.decode() for i in row] for row in ids]
    asked = json.loads((examples / "rows.request.json").read_text())
    assert asked["signature_name"] == "recommend"
    assert [row["k"] for row in asked["instances"]] == [5, 5]


def test_a_model_of_another_schema_is_refused(variants, data, tmp_path):
    other = data.model_copy(update={"fingerprint": "another"})
    with pytest.raises(ArtifactError, match="has another schema than"):
        publish(variants, other, REGISTERED, tmp_path / "models", keep=2)
    assert not (tmp_path / "models").exists()


def test_a_model_that_does_not_answer_is_not_published(variants, data, tmp_path):
    broken = {name: tmp_path / name for name in VARIANTS}
    for name, folder in broken.items():
        shutil.copytree(variants[name], folder)
    weights = broken["scann"] / "variables" / "variables.data-00000-of-00001"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="does not answer in a fresh process"):
        publish(broken, data, REGISTERED, tmp_path / "models", keep=2)
    assert not (tmp_path / "models").exists()


def test_nothing_published_nothing_withdrawn(tmp_path):
    with pytest.raises(ArtifactError, match="holds no exact or scann: nothing is published"):
        withdraw(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_server_config_names_the_folder_that_publish_fills(variant, published):
    config = text_format.Parse((SERVER / f"{variant}.config").read_text(), ModelServerConfig())
    (model,) = config.model_config_list.config
    assert model.base_path == f"/models/{variant}"
    example = published / variant / "1" / "assets.extra" / "examples" / "request.pb"
    assert PredictRequest.FromString(example.read_bytes()).model_spec.name == model.name
    assert model.model_version_policy.latest.num_versions == 1
    assert (published / model.base_path.removeprefix("/models/") / "1").is_dir()
    service = yaml.safe_load((SERVER / "compose.yaml").read_text())["services"][variant]
    assert f"./{variant}.config:/config/models.config:ro" in service["volumes"]
    assert "--model_config_file=/config/models.config" in service["command"]
