import json

import numpy as np
import pytest
import tensorflow as tf

import training.callbacks
from recsys.artifacts import ArtifactError
from training.callbacks import Checkpoints, EpochLog, FitState, Validation


def model_of(value):
    model = tf.keras.Sequential([tf.keras.layers.Dense(1, use_bias=False)])
    model.compile(optimizer=tf.keras.optimizers.Adam(0.1))
    model.build([None, 2])
    model.optimizer.build(model.trainable_variables)
    model.set_weights([np.full((2, 1), value, np.float32)])
    return model


def moments(model):
    return [v for v in model.optimizer.variables if "m/dense" in v.name.lower()]


def run(checkpoints, values):
    """Pretend to train: the weights of an epoch are its metric."""
    model = model_of(0)
    checkpoints.set_model(model)
    for epoch, value in enumerate(values, start=checkpoints.state.epoch):
        model.set_weights([np.full((2, 1), value, np.float32)])
        model.optimizer.iterations.assign(epoch + 1)
        for variable in moments(model):
            variable.assign(np.full(variable.shape, epoch + 1, np.float32))
        checkpoints.on_epoch_end(epoch, {"ndcg@20": value, "loss": 1 - value})
        if model.stop_training:
            break
    return model


def test_the_best_epoch_is_kept_and_patience_stops(tmp_path):
    checkpoints = Checkpoints(tmp_path, "ndcg@20", patience=2)
    run(checkpoints, [0.1, 0.3, 0.2, 0.25, 0.9])
    assert checkpoints.state.stopped
    assert (checkpoints.state.epoch, checkpoints.state.best_epoch) == (4, 2)
    assert sorted(p.name for p in tmp_path.glob("epoch-*")) == [
        "epoch-0002",
        "epoch-0003",
        "epoch-0004",
    ]
    best = model_of(0)
    assert checkpoints.restore_best(best).best("ndcg@20") == 0.3
    assert best.get_weights()[0].ravel().tolist() == pytest.approx([0.3, 0.3])


def test_a_new_process_resumes_with_weights_optimizer_and_curves(tmp_path):
    run(Checkpoints(tmp_path, "ndcg@20", patience=3), [0.1, 0.2])
    run_on = model_of(0)
    again = Checkpoints(tmp_path, "ndcg@20", patience=3)
    state = again.restore(run_on)
    assert state == FitState(
        epoch=2, best_epoch=2, curves={"ndcg@20": [0.1, 0.2], "loss": [0.9, 0.8]}
    )
    assert run_on.get_weights()[0].ravel().tolist() == pytest.approx([0.2, 0.2])
    assert run_on.optimizer.iterations.numpy() == 2
    slots = [v.numpy() for v in moments(run_on)]
    assert slots
    assert all((slot == 2).all() for slot in slots)


def test_without_a_checkpoint_it_starts_at_the_beginning(tmp_path):
    checkpoints = Checkpoints(tmp_path, "ndcg@20", patience=1)
    assert checkpoints.restore(model_of(0)) == FitState()
    assert FitState().best("ndcg@20") == -1.0


def test_killed_between_checkpoint_and_state_the_epoch_counts_as_unfinished(tmp_path, monkeypatch):
    run(Checkpoints(tmp_path, "ndcg@20", patience=3), [0.1])

    def killed(*_):
        raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path, "ndcg@20", patience=3)
    checkpoints.restore(model_of(0))
    with monkeypatch.context() as patch:
        patch.setattr(training.callbacks, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints, [0.2])
    model = model_of(0)
    state = Checkpoints(tmp_path, "ndcg@20", patience=3).restore(model)
    assert state.epoch == 1
    assert model.get_weights()[0].ravel().tolist() == pytest.approx([0.1, 0.1])


def damage(folder):
    for file in folder.glob("weights.data*"):
        file.write_bytes(b"\0" * file.stat().st_size)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    run(Checkpoints(tmp_path, "ndcg@20", patience=9), [0.2, 0.1, 0.1, 0.3])
    kept = sorted(p.name for p in tmp_path.glob("epoch-*"))
    assert kept == ["epoch-0001", "epoch-0003", "epoch-0004"]
    damage(tmp_path / "epoch-0004")
    again = Checkpoints(tmp_path, "ndcg@20", patience=9)
    model = model_of(0)
    assert again.restore(model).epoch == 3
    assert model.get_weights()[0].ravel().tolist() == pytest.approx([0.1, 0.1])
    assert again.restore_best(model).best_epoch == 1
    assert model.get_weights()[0].ravel().tolist() == pytest.approx([0.2, 0.2])
    damage(tmp_path / "epoch-0003")
    damage(tmp_path / "epoch-0001")
    with pytest.raises(ArtifactError, match=f"none of the 3 checkpoints in {tmp_path} can be read"):
        Checkpoints(tmp_path, "ndcg@20", patience=9).restore(model)


def test_within_an_epoch_it_saves_every_so_many_steps(tmp_path):
    checkpoints = Checkpoints(tmp_path, "ndcg@20", patience=3, every_steps=2)
    run(checkpoints, [0.1])
    model = model_of(5)
    checkpoints.set_model(model)
    checkpoints.set_params({"steps": 6})
    checkpoints.on_epoch_begin(1)
    names = []
    for batch in range(6):
        checkpoints.on_train_batch_end(batch)
        names.append(max(p.name for p in tmp_path.glob("epoch-*")))
    # None at the end of the epoch, which is saved with its metrics.
    last = ["epoch-0001", "epoch-0001-step-00000002", "epoch-0001-step-00000004"]
    assert names == [last[0], last[1], last[1], last[2], last[2], last[2]]
    again = Checkpoints(tmp_path, "ndcg@20", patience=3, every_steps=2)
    state = again.restore(model_of(0))
    assert (state.epoch, state.step, state.best_epoch) == (1, 4, 1)
    again.set_model(model)
    again.set_params({"steps": 2})
    again.on_epoch_begin(1)
    again.on_train_batch_end(0)
    again.on_train_batch_end(1)
    again.on_epoch_end(1, {"ndcg@20": 0.2, "loss": 0.8})
    assert again.state.folder == "epoch-0002"


def test_validation_reaches_later_callbacks_and_the_log():
    logs = {"loss": 1.0}
    seen = []
    Validation(lambda: {"ndcg@20": 0.5}).on_epoch_end(0, logs)
    EpochLog(lambda metrics, step: seen.append((metrics, step))).on_epoch_end(0, logs)
    assert seen == [({"loss": 1.0, "ndcg@20": 0.5}, 1)]


def test_state_round_trip(tmp_path):
    state = FitState(epoch=3, best_epoch=1, stopped=True, curves={"a": [1.0]})
    assert FitState.model_validate(json.loads(state.model_dump_json())) == state
