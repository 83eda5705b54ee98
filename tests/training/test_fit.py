import dataclasses
import signal
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
from recsys.metrics import per_query
from recsys.ranks import rank_queries
from training.embeddings import two_tower_scorer
from training.fit import _Inputs, _seed_all, fit

FIT = """
import sys
from pathlib import Path
from recsys.artifacts import PreparedData
from recsys.config import RunConfig
from training.fit import fit
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


def test_killed_in_the_middle_it_ends_like_an_undisturbed_one(trained, config, prepared, tmp_path):
    undisturbed, _ = trained
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [
        sys.executable,
        "-c",
        FIT,
        str(tmp_path / "config.json"),
        str(prepared.directory),
        str(tmp_path / "model"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    state = tmp_path / "model" / "checkpoints" / "epoch-0001" / "state.json"
    deadline = time.monotonic() + 120
    while not state.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.is_file(), process.stderr.read().decode()
    assert not TrainedModel.exists(tmp_path / "model")
    resumed = fit(config, prepared, tmp_path / "model")
    monitor = config.train.monitor
    assert resumed.best_epoch == undisturbed.best_epoch
    np.testing.assert_allclose(resumed.curves[monitor], undisturbed.curves[monitor], rtol=1e-6)
    assert not list((tmp_path / "model").glob(".*unfinished"))


def test_killed_within_an_epoch_it_goes_on_with_the_next_batch(config, prepared, tmp_path, caplog):
    train = config.train.model_copy(update={"checkpoint_steps": 4, "epochs": 2})
    config = config.model_copy(update={"train": train})
    whole = fit(config, prepared, tmp_path / "whole")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", FIT, str(tmp_path / "config.json"), str(prepared.directory)]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.PIPE)
    wait_and_kill(process, tmp_path / "killed/checkpoints/epoch-0000-step-00000004/state.json")
    with caplog.at_level("INFO"):
        resumed = fit(config, prepared, tmp_path / "killed")
    assert "resume after epoch 0, step " in caplog.text
    for name, curve in whole.curves.items():
        np.testing.assert_allclose(resumed.curves[name], curve, rtol=1e-6, err_msg=name)


def wait_and_kill(process, file):
    deadline = time.monotonic() + 240
    while not file.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_refit_learns_the_validation_labels_and_survives_a_kill(config, prepared, tmp_path):
    train = config.train.model_copy(update={"refit": True, "epochs": 3})
    model = config.model.model_copy(update={"mixed_precision": True})
    config = config.model_copy(update={"train": train, "model": model})
    whole = fit(config, prepared, tmp_path / "whole")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", FIT, str(tmp_path / "config.json"), str(prepared.directory)]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.PIPE)
    wait_and_kill(
        process, tmp_path / "killed" / "checkpoints" / "refit" / "epoch-0001" / "state.json"
    )
    assert not TrainedModel.exists(tmp_path / "killed")
    # Trained in half precision, and saved as servers want it.
    towers = tf.saved_model.load(str(whole.directory / whole.towers))
    query = towers.signatures["embed_query"].graph.as_graph_def()
    functions = [node for f in query.library.function for node in f.node_def]
    casts = {node.attr["DstT"].type for node in [*query.node, *functions]}
    assert tf.bfloat16.as_datatype_enum not in casts
    killed = fit(config, prepared, tmp_path / "killed")
    assert killed.before_refit == "towers_before_refit"
    assert killed.learned_until == prepared.train.last_at
    corpus = read_corpus(prepared)
    queries = read_interactions(prepared, prepared.test, corpus)
    scores = [
        two_tower_scorer(m.directory / m.towers, prepared, corpus, queries.history).scores(
            slice(0, 50)
        )
        for m in (whole, killed)
    ]
    np.testing.assert_allclose(*scores, atol=1e-5)
    plain = config.model_copy(update={"train": train.model_copy(update={"refit": False})})
    other = fit(plain, prepared, tmp_path / "plain")
    towers = other.directory / other.towers
    without = two_tower_scorer(towers, prepared, corpus, queries.history).scores(slice(0, 50))
    assert not np.allclose(without, scores[0], atol=1e-3)


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
