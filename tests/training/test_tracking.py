import pickle
import socket
import threading
import time

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient

from recsys.artifacts import EvaluationReport, TrainedRanker
from recsys.config import Cluster
from training.fit import fit
from training.tracking import Tracker, TrackingError, check_reachable, tracking_uri


@pytest.fixture
def tracker(config, tmp_path):
    return Tracker.open(config, tmp_path / "runs" / "o'ne", "token")


def test_one_run_per_token_wherever_its_folder_is(config, tracker, tmp_path):
    tracker.set_status("FAILED")
    again = Tracker.open(config, tmp_path / "runs" / "moved", "token")
    other = Tracker.open(config, tmp_path / "runs" / "o'ne", "another token")
    assert again.run_id == tracker.run_id
    assert other.run_id != tracker.run_id
    client = MlflowClient(tracker.uri)
    assert client.get_run(tracker.run_id).info.status == "RUNNING"


def test_every_setting_is_a_parameter_and_logging_twice_is_harmless(config, tracker):
    tracker.log_config(config)
    tracker.log_config(config)
    params = MlflowClient(tracker.uri).get_run(tracker.run_id).data.params
    assert params["train.global_batch_size"] == "32"
    assert params["data.split.kind"] == "time"


def test_metrics_and_artifacts(tracker, tmp_path):
    tracker.log_metrics({"ndcg@20": 0.5}, 3)
    file = tmp_path / "note.txt"
    file.write_text("x")
    tracker.log_artifact(file, "notes")
    # An event type may be called anything; MLflow allows few characters.
    tasks = {"add (to) cart": {"auc": 0.75, "ndcg@10": 0.25}}
    tracker.log_ranker(TrainedRanker.model_construct(held_out={"ranker": {"auc": 1}}, tasks=tasks))
    parts = {"model": {}, "baselines": {}, "impressions": {}, "tasks": tasks}
    parts["shown"] = {"model": {"auc": 0.625}}
    tracker.log_report(EvaluationReport.model_construct(**parts))
    client = MlflowClient(tracker.uri)
    metrics = client.get_run(tracker.run_id).data.metrics
    assert metrics["ranker/held_out/auc"] == 1
    assert metrics["ranker/held_out/task/add _to_ cart/auc"] == 0.75
    assert metrics["impressions/task/add _to_ cart/ndcg_at_10"] == 0.25
    assert metrics["impressions/shown/model/auc"] == 0.625
    point = client.get_metric_history(tracker.run_id, "ndcg_at_20")[0]
    assert (point.value, point.step) == (0.5, 3)
    assert [a.path for a in client.list_artifacts(tracker.run_id, "notes")] == ["notes/note.txt"]
    assert (tmp_path / "runs" / "mlartifacts").is_dir()


def test_tags_texts_and_pictures(tracker):
    tracker.set_tags({"recsys.version": "1", "recsys.git_changed": "true"})
    tracker.set_tags({"recsys.version": "2"})
    tracker.log_text("a table", "evaluation/summary.txt")
    tracker.log_figure(Figure(), "model/curves.png")
    client = MlflowClient(tracker.uri)
    tags = client.get_run(tracker.run_id).data.tags
    assert (tags["recsys.version"], tags["recsys.git_changed"]) == ("2", "true")
    for folder, file in (("evaluation", "summary.txt"), ("model", "curves.png")):
        found = client.list_artifacts(tracker.run_id, folder)
        assert [(a.path, a.file_size > 0) for a in found] == [(f"{folder}/{file}", True)]


def test_a_worker_logs_to_the_run_of_the_driver(tracker):
    log_metrics = pickle.loads(pickle.dumps(tracker.log_metrics))
    log_metrics({"loss": 0.5}, 2)
    tracker.log_application("app-1")
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert run.data.metrics == {"loss": 0.5}
    assert run.data.tags["recsys.spark_application"] == "app-1"


def test_a_server_that_is_away_during_a_fit_costs_no_epoch(
    mlflow_server, config, prepared, tmp_path, caplog
):
    cluster = Cluster(tracking_uri=mlflow_server.uri)
    train = config.train.model_copy(update={"epochs": 4, "patience": 4})
    config = config.model_copy(update={"cluster": cluster, "train": train})
    tracker = Tracker.open(config, tmp_path / "one", "token")

    def log_curves(curves):
        done = len(curves["loss"])
        if done == 2:
            mlflow_server.stop()
        tracker.follow_curves(curves)
        if done == 3:
            mlflow_server.start()

    model = fit(config, prepared, tmp_path / "model", tracker.run_id, log_curves)
    assert caplog.text.count("metrics are kept until MLflow can be used again") == 2
    # The successor of a chief that was killed does not know what has been logged.
    pickle.loads(pickle.dumps(tracker)).log_curves(model.curves)
    for name, curve in model.curves.items():
        history = MlflowClient(mlflow_server.uri).get_metric_history(
            tracker.run_id, name.replace("@", "_at_")
        )
        assert [(m.step, m.value) for m in history] == list(enumerate(curve, 1))


def test_system_metrics_go_on_where_they_stopped(tracker, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    client = MlflowClient(tracker.uri)

    def steps():
        history = client.get_metric_history(tracker.run_id, "system/cpu_utilization_percentage")
        return [metric.step for metric in history]

    for _ in range(2):
        before, deadline = len(steps()), time.monotonic() + 60
        with tracker.system_metrics():
            while len(steps()) < before + 2 and time.monotonic() < deadline:
                time.sleep(0.05)
        assert not [t for t in threading.enumerate() if t.name == "SystemMetricsMonitor"]
    assert steps() == list(range(len(steps())))
    assert len(steps()) >= 4


def test_a_nested_run_is_found_again_by_its_token(tracker):
    child = tracker.child("trial-0001", "study/1")
    child.log_params({"train.epochs": "3"})
    child.log_params({"train.epochs": "4"})
    child.set_status("KILLED")
    client = MlflowClient(tracker.uri)
    run = client.get_run(child.run_id)
    assert run.data.tags["mlflow.parentRunId"] == tracker.run_id
    assert (run.info.run_name, run.info.status) == ("trial-0001", "KILLED")
    assert run.data.params == {"train.epochs": "3"}
    assert tracker.child("trial-0001", "study/1").run_id == child.run_id
    assert client.get_run(child.run_id).info.status == "RUNNING"
    assert tracker.child("trial-0001", "another study/1").run_id != child.run_id


def test_default_and_configured_store(tmp_path):
    assert tracking_uri(Cluster(), tmp_path / "runs" / "one") == (
        f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    )
    assert tracking_uri(Cluster(tracking_uri="databricks"), tmp_path) == "databricks"


def test_a_server_that_does_not_answer_is_told_within_seconds():
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9: no MLflow server answers"):
        check_reachable("http://127.0.0.1:9")


def test_a_listening_server_and_other_stores_pass():
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_reachable(f"http://127.0.0.1:{server.getsockname()[1]}")
    check_reachable("sqlite:////nowhere/at/all.db")


def test_an_unreadable_store_is_a_clear_error(config, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "mlflow.db").write_text("this is no database, and long enough to be seen as such" * 9)
    with pytest.raises(TrackingError, match=r"MLflow at sqlite:.*mlflow\.db"):
        Tracker.open(config, folder / "one", "token")
