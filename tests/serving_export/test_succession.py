"""Claims and terms on real stores: SQLite, and a folder of files that MLflow has to be asked for."""

import subprocess
import sys

import mlflow
import pytest
from mlflow import MlflowClient

from serving_export.registry import connect, find_champion
from serving_export.succession import Succession, _alone

# Waits until its rival is as far, then claims term after term; prints who has each.
CLAIM = """
import sys, time
from pathlib import Path
from mlflow import MlflowClient
from serving_export.registry import connect
from serving_export.succession import Succession

folder, uri, version, terms = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
connect(uri)
succession = Succession(MlflowClient(), "raced")
for term in range(terms):
    (folder / f"ready {term} {version}").touch()
    while len(list(folder.glob(f"ready {term} *"))) < 2:
        time.sleep(0.0005)
    print(succession.claim(version, term))
"""


@pytest.fixture(params=["sqlite", "files"])
def store(request, tmp_path, monkeypatch):
    """Address of an empty store; afterwards this process is connected to the one before."""
    before = mlflow.get_tracking_uri()
    if request.param == "files":
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        (tmp_path / "mlruns of all").mkdir()
        yield (tmp_path / "mlruns of all").as_uri()
    else:
        yield f"sqlite:///{tmp_path / 'mlflow.db'}"
    connect(before)


@pytest.fixture
def versions(store):
    """Registers so many versions of a model; returns its succession."""

    def register(name, count):
        connect(store)
        client = MlflowClient()
        client.create_registered_model(name)
        run_id = client.create_run(client.create_experiment(name)).info.run_id
        for _ in range(count):
            client.create_model_version(name, "/nowhere", run_id)
        return Succession(client, name), client

    return register


def test_the_first_claim_of_a_term_stays(versions):
    succession, _ = versions("claimed", 2)
    assert succession.standing() == (0, None)
    assert succession.winner(0) is None
    assert succession.claim("1", 0) == "1"
    assert succession.claim("2", 0) == "1"
    assert succession.claim("1", 0) == "1"
    succession.give_back("2", 0)
    assert succession.term() == 0
    succession.give_back("1", 0)
    assert succession.term() == 1
    assert succession.claim("2", 1) == "2"
    assert succession.move("2", 1)
    assert succession.standing() == (2, "2")
    assert not succession.move("1", 1)
    assert succession.standing() == (2, "2")


def test_two_processes_never_have_the_same_term(versions, store, tmp_path):
    versions("raced", 2)
    command = [sys.executable, "-c", CLAIM, str(tmp_path), store]
    jobs = [
        subprocess.Popen([*command, version, "40"], stdout=subprocess.PIPE, text=True)
        for version in "12"
    ]
    try:
        told = [job.communicate(timeout=300)[0].split() for job in jobs]
    finally:
        # One waits for the other.
        for job in jobs:
            job.kill()
    assert len(told[0]) == 40
    assert told[0] == told[1]


def test_a_claim_of_a_version_that_was_deleted_is_void(versions):
    succession, client = versions("deleted", 2)
    assert succession.claim("1", 0) == "1"
    assert succession.standing() == (0, None)
    client.delete_model_version("deleted", "1")
    assert succession.standing() == (1, None)
    assert succession.claim("2", 1) == "2"


def test_a_move_that_was_killed_before_the_next_term_is_ended(versions):
    succession, client = versions("killed", 2)
    succession.claim("1", 0)
    client.set_registered_model_alias("killed", "champion", "1")
    assert succession.standing() == (1, "1")


def test_who_overrules_has_a_term_that_the_others_have_not(versions):
    succession, _ = versions("overruled", 3)
    assert succession.overrule("1", 0) == 0
    assert succession.claim("2", 0) == "1"
    succession.move("1", 0)
    assert succession.claim("3", 1) == "3"
    assert succession.overrule("1", 1) == 2
    assert succession.term() == 2
    succession.move("1", 2)
    assert find_champion("overruled") == "1"


@pytest.mark.parametrize("after", [False, True])
def test_a_move_that_is_overruled_on_its_way_is_undone(versions, monkeypatch, after):
    """Somebody rolls back between the look at the term and the alias, or right after the alias."""
    succession, client = versions("rolled back", 3)
    succession.claim("2", 0)
    succession.move("2", 0)
    succession.claim("3", 1)
    other, set_alias = Succession(MlflowClient(), "rolled back"), client.set_registered_model_alias

    def overtaken(*arguments):
        monkeypatch.undo()
        if after:
            set_alias(*arguments)
        other.move("1", other.overrule("1", 1))
        if not after:
            set_alias(*arguments)

    monkeypatch.setattr(client, "set_registered_model_alias", overtaken)
    assert not succession.move("3", 1)
    assert find_champion("rolled back") == "1"
    assert succession.standing() == (3, "1")


@pytest.mark.parametrize("uri", ["databricks", "databricks-uc", "databricks://shop", "http://h:1"])
def test_only_folders_of_files_are_locked(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with _alone(uri):
        pass
    assert list(tmp_path.iterdir()) == []
    for folder in (str(tmp_path), tmp_path.as_uri()):
        with _alone(folder):
            assert [path.name for path in tmp_path.iterdir()] == [".recsys-champion.lock"]
