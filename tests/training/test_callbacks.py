import json

import numpy as np
import pytest
import tensorflow as tf

import training.callbacks
from recsys.artifacts import ArtifactError
from training.attempt import WorkersLost
from training.callbacks import Checkpoints, EpochLog, FitState, Validation, newest_checkpoint
from training.distribute import launch


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


@pytest.mark.spark
def test_the_chief_chooses_the_checkpoint_for_all(two_workers, launched, spark, tmp_path):
    for view in ("whole", "damaged"):
        run(Checkpoints(tmp_path / view, "ndcg@20", patience=9), [0.25, 0.5])
    damage(tmp_path / "damaged" / "epoch-0002")
    once = two_workers.model_copy(update={"max_restarts": 0})
    newest = tmp_path / "damaged" / "epoch-0002"
    with pytest.raises(WorkersLost, match=f"the chief reads {newest}, this worker cannot: "):
        launch(launched.restore_apart, once, tmp_path, folder=tmp_path, spark=lambda: spark)
    restored = {f.name: f.read_text() for f in sorted(tmp_path.glob("restored-*"))}
    assert restored.pop("restored-1-0", "2 [0.5, 0.5]") == "2 [0.5, 0.5]"
    assert restored == {"restored-0-0": "1 [0.25, 0.25]", "restored-0-1": "1 [0.25, 0.25]"}


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


def test_validation_reaches_later_callbacks_and_the_log(tmp_path):
    logs = {"loss": 1.0}
    seen = []
    checkpoints = Checkpoints(tmp_path, "ndcg@20", patience=3)
    checkpoints.set_model(model_of(0))
    log = EpochLog(checkpoints, seen.append)
    log.catch_up()
    for callback in (Validation(lambda: {"ndcg@20": 0.5}), checkpoints, log):
        callback.on_epoch_end(0, logs)
    assert seen == [{"loss": [1.0], "ndcg@20": [0.5]}]


def test_an_epoch_that_was_saved_but_not_logged_is_logged_after_the_restart(tmp_path):
    run(Checkpoints(tmp_path, "ndcg@20", patience=3), [0.1, 0.2])
    seen = []
    again = Checkpoints(tmp_path, "ndcg@20", patience=3)
    again.restore(model_of(0))
    EpochLog(again, seen.append).catch_up()
    assert seen == [{"ndcg@20": [0.1, 0.2], "loss": [0.9, 0.8]}]


def test_the_newest_checkpoint_has_the_greatest_name(tmp_path):
    assert newest_checkpoint(tmp_path) == newest_checkpoint(tmp_path / "missing") == ""
    states = [FitState(), FitState(step=3), FitState(epoch=1), FitState(epoch=1, step=4)]
    folders = [tmp_path / state.folder for state in [*states, FitState(epoch=2)]]
    names = []
    for folder in [*folders, tmp_path / "refit" / FitState(step=3).folder]:
        folder.mkdir(parents=True)
        (folder / "weights.index").touch()
        assert newest_checkpoint(tmp_path) == max(names, default="")
        (folder / "state.json").touch()
        names.append(newest_checkpoint(tmp_path))
    assert names == sorted(set(names))
    assert names[-1] == "refit/epoch-0000-step-00000003"


def test_state_round_trip(tmp_path):
    state = FitState(epoch=3, best_epoch=1, stopped=True, curves={"a": [1.0]})
    assert FitState.model_validate(json.loads(state.model_dump_json())) == state
