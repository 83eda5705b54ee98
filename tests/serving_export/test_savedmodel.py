import json
import math
import re

import pytest
import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from recsys.artifacts import ArtifactError, ExportedModel, with_corpus_of
from recsys.features import raw_signature
from recsys.schema import Schema
from serving_export import index_tuning, savedmodel
from serving_export.savedmodel import export
from serving_export.searcher import Structure


@pytest.fixture
def inputs(tiny, tmp_path):
    data = tiny.write_data(tmp_path / "data")
    return tiny.run_config(), data, tiny.write_model(data, tmp_path / "model")


@pytest.fixture
def no_subprocess(monkeypatch):
    """Verification in a fresh process has its own test."""
    monkeypatch.setattr(savedmodel, "verify", lambda *_: {"exact": 1.0, "scann": 1.0})


def test_manifest_says_what_was_made(world, tiny):
    exported = world.exported
    assert exported.variants == {"scann": "scann", "exact": "exact"}
    assert exported.num_candidates == tiny.num_items
    assert exported.parity == {"scann": 1.0, "exact": 1.0}
    assert exported.index.kind == "brute_force"
    assert exported.index.recall == 1.0
    table = (exported.directory / "index.txt").read_text().splitlines()
    assert table[1].split()[:3] == ["brute_force", "*", "1.0000"]
    assert exported.fingerprint == exported.features.fingerprint
    assert re.fullmatch(r"[0-9a-f]{32}-[0-9a-f]{32}", exported.digest)
    assert sorted(p.name for p in exported.directory.iterdir()) == [
        "corpus.json", "exact", "index.png", "index.txt", "manifest.json", "scann",
    ]  # fmt: skip


@pytest.mark.parametrize("variant", ["scann", "exact"])
def test_contract_travels_with_the_variant_and_is_what_it_answers(world, variant):
    folder = world.exported.directory / variant
    contract = json.loads((folder / "assets.extra" / "contract.json").read_text())
    assert contract["fingerprint"] == world.exported.fingerprint
    assert contract["index"]["recall"] == 1.0
    signatures = world.models[variant].signatures
    assert set(contract["signatures"]) == set(signatures) == {
        "serving_default", "recommend", "embed_query", "embed_candidate",
    }  # fmt: skip
    for name, described in contract["signatures"].items():
        _, specs = signatures[name].structured_input_signature
        found = {
            n: {"dtype": s.dtype.name, "shape": None if n == "k" else s.shape.as_list()}
            for n, s in specs.items()
        }
        assert described["inputs"] == found
        assert set(described["outputs"]) == set(signatures[name].structured_outputs)
    assert contract["signatures"]["recommend"]["inputs"]["history"] == {
        "dtype": "string", "shape": [None, None],
    }  # fmt: skip
    # Who asked for no filters has none to give.
    assert set(contract["signatures"]["recommend"]["inputs"]) == {
        "history", "member", "country", "basket", "clicked_at", "taste", "k", "exclusions",
    }  # fmt: skip
    assert "filters" not in contract
    assert contract["availability"] is True
    assert contract["signatures"]["embed_query"]["inputs"]["taste"] == {
        "dtype": "float32", "shape": [None, 3],
    }  # fmt: skip


def test_exact_variant_has_stock_ops_only(world):
    def ops(variant):
        file = world.exported.directory / variant / "saved_model.pb"
        graph = SavedModel.FromString(file.read_bytes()).meta_graphs[0].graph_def
        return {n.op for f in graph.library.function for n in f.node_def} | {
            n.op for n in graph.node
        }

    assert not {op for op in ops("exact") if "scann" in op.lower()}
    assert {op for op in ops("scann") if "scann" in op.lower()} == {
        "Scann>ScannSearchBatched", "Scann>TensorsToScann",
    }  # fmt: skip


def test_digest_follows_content(inputs, no_subprocess, tmp_path, tiny):
    config, data, model = inputs
    first = export(config, data, model, tmp_path / "export")
    again = export(config, data, model, tmp_path / "elsewhere")
    retrained = tiny.write_model(data, tmp_path / "retrained", seed=4)
    other = export(config, data, retrained, tmp_path / "export")
    assert first.digest == again.digest
    assert other.digest != first.digest
    assert ExportedModel.load(tmp_path / "export") == other


def test_a_later_corpus_is_embedded_by_the_model_that_is_there(inputs, tmp_path, tiny):
    """Ten items more; what is cold is still said by the vocabulary that the model knows."""
    config, data, model = inputs
    later = tiny.write_data(tmp_path / "later", num_items=tiny.num_items + 10)
    exported = export(config, with_corpus_of(data, later), model, tmp_path / "export")
    assert exported.parity == {"scann": 1.0, "exact": 1.0}
    assert exported.num_candidates == tiny.num_items + 10
    served = tf.saved_model.load(str(exported.directory / "scann"))
    ids, _ = tiny.ask(served, [[tiny.item(0)]], k=100)
    assert set(ids[0]) == {tiny.item(row) for row in range(tiny.num_items + 10)}


def test_a_later_corpus_of_other_features_is_refused(inputs, tmp_path, tiny):
    _, data, _ = inputs
    later = tiny.write_data(tmp_path / "later")
    features = tuple(f for f in later.features.features if f.name != "basket")
    schema = Schema(features=features)
    later = later.model_copy(update={"features": schema, "fingerprint": schema.fingerprint})
    with pytest.raises(ArtifactError, match=r"later holds another schema .*'basket' is missing"):
        with_corpus_of(data, later)


def test_failed_export_keeps_the_good_one(inputs, no_subprocess, tmp_path, monkeypatch):
    config, data, model = inputs
    good = export(config, data, model, tmp_path / "export")

    def refuse(*_):
        raise ArtifactError("answers differ")

    monkeypatch.setattr(savedmodel, "verify", refuse)
    with pytest.raises(ArtifactError, match="answers differ"):
        export(config, data, model, tmp_path / "export")
    assert ExportedModel.load(tmp_path / "export") == good
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_hashed_index_is_exported_too(inputs, tmp_path, monkeypatch, tiny):
    """Through the fresh process: reordering and its parameters survive the file."""
    _, data, model = inputs
    monkeypatch.setattr(index_tuning, "_structures", lambda _: [Structure("hashed")])
    exported = export(tiny.run_config(), data, model, tmp_path / "export")
    assert exported.index.kind == "hashed"
    assert exported.parity["exact"] == 1.0
    assert exported.parity["scann"] >= 0.9


def test_model_of_another_schema_is_refused_naming_the_difference(inputs, tmp_path):
    config, data, model = inputs
    features = [f for f in data.features.features if f.name != "basket"]
    features[0] = features[0].model_copy(update={"length": 9})
    schema = Schema(features=tuple(features))
    changed = data.model_copy(update={"features": schema, "fingerprint": schema.fingerprint})
    with pytest.raises(ArtifactError) as error:
        export(config, changed, model, tmp_path / "export")
    assert "'basket' is missing" in str(error.value)
    assert "'history'.length was 5, is 9" in str(error.value)
    assert "recsys fit" in str(error.value)


def test_diverged_towers_are_refused(inputs, tmp_path):
    config, data, _ = inputs

    def nothing(**features):
        rows = tf.shape(next(iter(features.values())))[0]
        return {"embedding": tf.fill([rows, 4], math.nan)}

    towers = tf.Module()
    towers.nothing = tf.function(nothing)
    signatures = {
        name: towers.nothing.get_concrete_function(**specs)
        for name, specs in (
            ("embed_query", raw_signature(data.features.query)),
            ("embed_candidate", raw_signature(data.features.candidate)),
        )
    }
    model = inputs[2].model_copy(update={"towers": "diverged"})
    tf.saved_model.save(towers, str(model.directory / "diverged"), signatures=signatures)
    with pytest.raises(ArtifactError, match="not finite"):
        export(config, data, model, tmp_path / "export")


def test_without_held_out_queries_nothing_is_measured(inputs, tmp_path):
    config, data, model = inputs
    empty = data.model_copy(update={"test": data.test.model_copy(update={"num_examples": 0})})
    with pytest.raises(ArtifactError, match=r"test split has no examples.*data\.split"):
        export(config, empty, model, tmp_path / "export")
