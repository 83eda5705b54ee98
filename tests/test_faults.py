"""Kill -9 in the middle of each step, then do the step again: as if nothing had happened."""

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from recsys.artifacts import (
    EvaluationReport,
    ExportedModel,
    PreparedData,
    Promotion,
    Scoring,
    TrainedModel,
)
from recsys.run_folder import RunFolder
from recsys.steps import STEPS, steps_of

RECSYS = Path(sys.executable).with_name("recsys")
PATIENCE = 400


@pytest.fixture
def copied(finished_run, tmp_path):
    """A run folder that holds the steps before `step`, in a place of its own."""

    def copy(step):
        folder = tmp_path / "runs" / "planted"
        folder.mkdir(parents=True)
        shutil.copy(finished_run / "config.json", folder)
        names = steps_of(RunFolder(folder).config())
        for earlier in names[: names.index(step)]:
            kept = STEPS[earlier][0]
            shutil.copytree(finished_run / kept, folder / kept)
        return folder

    return copy


def start(step, folder, clicks_config):
    arguments = ["--run-dir", str(folder)]
    if step == "prepare":
        arguments += ["--config", str(clicks_config)]
    log = (folder.parent / f"{step}.log").open("w")
    # A session of its own, so that Spark's processes die with it.
    return subprocess.Popen(
        [RECSYS, step, *arguments], stderr=log, stdout=log, start_new_session=True
    )


def kill_when(process, reached, folder, step):
    deadline = time.monotonic() + PATIENCE
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    was_running = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    told = (folder.parent / f"{step}.log").read_text()
    assert was_running, f"{step} was over before it could be killed:\n{told}"
    assert not STEPS[step][1].exists(folder / STEPS[step][0])


def again(step, folder, clicks_config):
    process = start(step, folder, clicks_config)
    code = process.wait(PATIENCE)
    told = (folder.parent / f"{step}.log").read_text()
    assert code == 0, told
    return told


def logged(folder, step, text):
    return lambda: text in (folder.parent / f"{step}.log").read_text()


def digests(folder):
    found = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name.startswith("part-") and file.suffix != ".crc"
    }
    assert found
    return found


@pytest.mark.spark
def test_prepare(copied, clicks_config, finished_run):
    folder = copied("prepare")
    process = start("prepare", folder, clicks_config)
    kill_when(process, logged(folder, "prepare", "corpus: "), folder, "prepare")
    again("prepare", folder, clicks_config)
    for split in ("train", "validation", "test", "corpus"):
        assert digests(folder / "data" / split) == digests(finished_run / "data" / split)
    new, old = (PreparedData.load(f / "data") for f in (folder, finished_run))
    assert new.model_dump(exclude={"created_at"}) == old.model_dump(exclude={"created_at"})
    assert not [p for p in (folder / "data").iterdir() if p.name.startswith(".")]


def test_fit(copied, clicks_config, finished_run):
    folder = copied("fit")
    process = start("fit", folder, clicks_config)
    kill_when(process, (folder / "model/checkpoints/epoch-0001/state.json").is_file, folder, "fit")
    assert "resume after epoch" in again("fit", folder, clicks_config)
    new, old = (TrainedModel.load(f / "model") for f in (folder, finished_run))
    assert new.best_epoch == old.best_epoch
    for metric, curve in old.curves.items():
        np.testing.assert_allclose(new.curves[metric], curve, rtol=1e-6)
    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    steps = [m.step for m in client.get_metric_history(new.mlflow_run_id, "ndcg_at_20")]
    assert steps == list(range(1, len(old.curves["ndcg@20"]) + 1))


@pytest.mark.spark
def test_evaluate(copied, clicks_config, finished_run):
    folder = copied("evaluate")
    process = start("evaluate", folder, clicks_config)
    kill_when(process, logged(folder, "evaluate", "ranked"), folder, "evaluate")
    again("evaluate", folder, clicks_config)
    new, old = (EvaluationReport.load(f / "evaluation") for f in (folder, finished_run))
    assert new.model_dump(exclude={"created_at"}) == old.model_dump(exclude={"created_at"})


def test_export(copied, clicks_config, finished_run):
    folder = copied("export")
    process = start("export", folder, clicks_config)
    kill_when(process, (folder / ".export.new" / "scann").is_dir, folder, "export")
    again("export", folder, clicks_config)
    new, old = (ExportedModel.load(f / "export") for f in (folder, finished_run))
    assert new.digest == old.digest
    assert new.parity == old.parity
    assert new.index.recall == old.index.recall
    assert not (folder / ".export.new").exists()


@pytest.mark.spark
def test_from_register_to_score(copied, clicks_config, finished_run):
    """Each killed and done again, in one folder: a registry cannot be copied from another run."""
    folder = copied("register")
    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    register_killed(folder, clicks_config, client)
    promote_killed(folder, clicks_config, client)
    score_killed(folder, clicks_config, finished_run)


def register_killed(folder, clicks_config, client):
    process = start("register", folder, clicks_config)
    artifacts = folder.parent / "mlartifacts"
    kill_when(process, lambda: any(artifacts.rglob("saved_model.pb")), folder, "register")
    again("register", folder, clicks_config)
    versions = client.search_model_versions("name='planted'")
    assert [str(version.version) for version in versions] == ["1"]


def promote_killed(folder, clicks_config, client):
    def gate_has_begun():
        with sqlite3.connect(folder.parent / "mlflow.db") as connection:
            query = "select count(*) from model_version_tags where key like 'gate%'"
            return connection.execute(query).fetchone()[0] > 0

    process = start("promote", folder, clicks_config)
    kill_when(process, gate_has_begun, folder, "promote")
    again("promote", folder, clicks_config)
    promotion = Promotion.load(folder / "promotion")
    champion = client.get_model_version_by_alias("planted", "champion")
    assert promotion.promoted
    assert str(champion.version) == promotion.model_version
    assert any("markov" in reason for reason in promotion.reasons)


def score_killed(folder, clicks_config, finished_run):
    partial = folder / ".scoring.partial"

    def written():
        return list((partial / "recommendations").glob("part-*"))

    process = start("score", folder, clicks_config)
    kill_when(process, written, folder, "score")
    done = {file.name: file.stat().st_mtime_ns for file in written()}
    again("score", folder, clicks_config)
    result = folder / "scoring" / "recommendations"
    assert len(list(result.iterdir())) == 15 > len(done) > 0
    assert {name: (result / name).stat().st_mtime_ns for name in done} == done
    new, old = (Scoring.load(f / "scoring") for f in (folder, finished_run))
    rows, expected = (
        pd.read_parquet(s.directory / s.destination).sort_values("user", ignore_index=True)
        for s in (new, old)
    )
    assert rows["items"].map(list).tolist() == expected["items"].map(list).tolist()
    assert not partial.exists()
