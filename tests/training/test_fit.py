import dataclasses
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from recsys.artifacts import ArtifactError, TrainedModel
from recsys.baselines import counting_baseline
from recsys.config import RunConfig
from recsys.dataset import read_corpus, read_interactions, read_sequences
from recsys.features import FeatureEncoder
from recsys.metrics import per_query
from recsys.neighbours import neighbours
from recsys.ranks import rank_queries
from training.embeddings import two_tower_scorer
from training.fit import _Inputs, _seed_all, fit

FIT = """
import logging
import sys
from pathlib import Path
from recsys.artifacts import PreparedData
from recsys.config import RunConfig
from training.fit import fit
logging.basicConfig(level="INFO")
config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
fit(config, PreparedData.load(Path(sys.argv[2])), Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def trained(config, prepared, tmp_path_factory):
    logged = []
    directory = tmp_path_factory.mktemp("fit")
    model = fit(config, prepared, directory, "run", logged.append)
    return model, logged


def test_the_model_learns_what_was_planted(trained, config, prepared):
    model, _ = trained
    corpus = read_corpus(prepared)
    queries = read_interactions(prepared, prepared.test, corpus)
    known = [read_sequences(prepared, prepared.train, corpus)]
    scorers = {
        "towers": two_tower_scorer(
            model.directory / model.towers, prepared, corpus, queries.history
        ),
        "popularity": counting_baseline("popularity", known, queries, len(corpus)),
    }
    hits = {
        name: per_query(rank_queries(name, s, queries, len(corpus), 1, seed=1).rank, [1])
        for name, s in scorers.items()
    }
    assert hits["towers"]["recall@1"].mean() > 0.6
    assert hits["popularity"]["recall@1"].mean() < 0.2


def test_the_manifest_tells_the_training(trained, config):
    model, logged = trained
    assert TrainedModel.load(model.directory).model_dump() == model.model_dump()
    curve = model.curves[config.train.monitor]
    assert [len(curves["loss"]) for curves in logged] == list(range(1, len(curve) + 1))
    assert logged[-1] == model.curves
    assert curve[model.best_epoch - 1] == max(curve)
    assert model.mlflow_run_id == "run"
    assert model.versions["tensorflow"] == tf.__version__


def test_killed_within_an_epoch_and_in_the_refit_it_ends_like_an_undisturbed_one(
    config, prepared, tmp_path, caplog
):
    """Trained in half precision, with neighbours; the refit learns the validation labels too."""
    train = config.train.model_copy(update={"refit": True, "checkpoint_steps": 4, "epochs": 2})
    model = config.model.model_copy(update={"mixed_precision": True, "num_neighbours": 4})
    config = config.model_copy(update={"train": train, "model": model})
    whole = fit(config, prepared, tmp_path / "whole")
    checkpoints = tmp_path / "killed" / "checkpoints"
    start_and_kill(config, prepared, tmp_path, checkpoints)
    told = start_and_kill(config, prepared, tmp_path, checkpoints / "refit")
    assert "resume after epoch 0, step " in told
    with caplog.at_level("INFO"):
        killed = fit(config, prepared, tmp_path / "killed")
    assert "resume after epoch 0, step " in caplog.text
    for name, curve in whole.curves.items():
        np.testing.assert_allclose(killed.curves[name], curve, rtol=1e-6, err_msg=name)
    assert killed.before_refit == "towers_before_refit"
    assert killed.learned_until == prepared.train.last_at
    query = tf.saved_model.load(str(whole.directory / whole.towers)).signatures["embed_query"]
    graph = query.graph.as_graph_def()
    functions = [node for f in graph.library.function for node in f.node_def]
    casts = {node.attr["DstT"].type for node in [*graph.node, *functions]}
    assert tf.bfloat16.as_datatype_enum not in casts
    splits = {
        "towers": [prepared.train, prepared.recent],
        "towers_before_refit": [prepared.train],
    }
    encoder = FeatureEncoder(prepared)
    corpus = read_corpus(prepared)
    history = read_interactions(prepared, prepared.test, corpus).history
    for name, learned in splits.items():
        loaded = tf.saved_model.load(str(whole.directory / name))
        near = loaded._candidate._items._neighbours
        np.testing.assert_array_equal(near, neighbours(prepared, learned, encoder, 4))
        scores = [
            two_tower_scorer(m.directory / name, prepared, corpus, history).scores(slice(0, 50))
            for m in (whole, killed)
        ]
        np.testing.assert_allclose(*scores, atol=1e-5, err_msg=name)
    towers = whole.directory / "towers"
    refitted = two_tower_scorer(towers, prepared, corpus, history).scores(slice(0, 50))
    assert not np.allclose(scores[0], refitted, atol=1e-3)


def start_and_kill(config, prepared, folder, checkpoints):
    """Train in a process until there is a checkpoint in this folder; give what it has told."""
    (folder / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", FIT, folder / "config.json", prepared.directory]
    log = folder / f"{checkpoints.name}.log"
    with log.open("w") as stream:
        process = subprocess.Popen([*command, folder / "killed"], stderr=stream)
    deadline = time.monotonic() + 400
    while not list(checkpoints.glob("*/state.json")) and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.02)
    was_running = process.poll() is None
    process.kill()
    process.wait()
    told = log.read_text()
    assert was_running, told
    assert list(checkpoints.glob("*/state.json")), told
    assert not TrainedModel.exists(folder / "killed")
    return told


def test_a_seed_may_be_zero(config, prepared):
    try:
        _seed_all(0)
        assert next(iter(_Inputs(config, prepared).training([prepared.train], range(1))))
    finally:
        _seed_all(1)


def test_labels_that_training_never_saw_do_not_count(config, prepared):
    inputs = _Inputs(config, prepared)
    count = np.where(np.arange(len(inputs.corpus)) < 40, inputs.corpus.count, 0)
    inputs.corpus = dataclasses.replace(inputs.corpus, count=count)
    batch = next(iter(inputs.training([prepared.recent], range(1))))
    assert (batch["row"].numpy() < 40).all()
    assert (batch["weight"].numpy() == 0).any()
    model = inputs.build_model([prepared.recent])
    assert np.isfinite(model.train_step(batch)["loss"])


def test_data_of_another_schema_are_refused(config, prepared, tmp_path):
    changed = config.model_dump()
    changed["features"] = [f for f in changed["features"] if f["name"] != "title"]
    with pytest.raises(ArtifactError, match="prepared for other features"):
        fit(RunConfig.model_validate(changed), prepared, tmp_path)
    assert not list(tmp_path.iterdir())
