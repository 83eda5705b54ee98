"""A writer that dies at any step leaves the old data or the new data, never a mixture."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from training.tfrecord import TFRecordError, commit, write_records
from training.tfrecord.commit import StagedPart, WriteJob
from training.tfrecord.framing import read_windows
from training.tfrecord.paths import data_files

OLD, NEW = [b"old 0", b"old 1"], [b"new 0", b"new 1", b"new 2"]


class Killed(BaseException):
    """Stands for kill -9: nothing of the job's code runs after it."""


def stage(job, records):
    job.prepare()
    parts = []
    for index, record in enumerate(records):
        part = StagedPart(index, 7, ".tfrecord")
        write_records(job.staged_path(part), [pa.array([record], pa.large_binary())])
        parts.append(part)
    return parts


def write(target, records, job="job", overwrite=True):
    write_job = WriteJob(target, job, overwrite)
    write_job.commit(stage(write_job, records), "{}")


def seen(target):
    _, files = data_files(str(target))
    records = [r for f in files for w in read_windows(f) for r in w.records.to_pylist()]
    return sorted(records)


def die_at(monkeypatch, step):
    """Let the ``step``-th change of the file system be the last thing the process does."""
    left = [step]

    def dying(change):
        def run(*args, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return change(*args, **kwargs)

        return run

    for owner, name in (
        (Path, "rename"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (Path, "open"),
        (os, "fsync"),
        (os, "rmdir"),
        (os, "unlink"),
    ):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize(("overwrite", "after"), [(True, NEW), (False, OLD + NEW)])
def test_death_at_every_step_of_a_commit(tmp_path, monkeypatch, overwrite, after):
    states = []
    for step in range(200):
        base = tmp_path / str(step)
        base.mkdir()
        target = base / "out"
        write(target, OLD, "first")
        job = WriteJob(target, "second", overwrite)
        parts = stage(job, NEW)
        finished = False
        with monkeypatch.context() as patch:
            die_at(patch, step)
            try:
                job.commit(parts, "{}")
                finished = True
            except Killed:
                pass
        state = seen(target)
        assert state in (sorted(OLD), sorted(after)), f"mixture after step {step}"
        states.append(state == sorted(after))
        write(target, [b"third"], "third", overwrite=False)
        assert seen(target) == sorted([*state, b"third"]), f"not recovered after step {step}"
        assert [p.name for p in base.iterdir()] == ["out"], f"leftovers after step {step}"
        assert not list(target.glob("_append*"))
        shutil.rmtree(base)
        if finished:
            break
    assert finished
    assert len(states) > 10
    assert states == sorted(states)
    assert not states[0]


def test_death_while_staging_shows_nothing_and_is_cleaned(tmp_path):
    target = tmp_path / "out"
    write(target, OLD, "first")
    stage(WriteJob(target, "dead", True), NEW)
    assert len(list(tmp_path.iterdir())) == 2
    assert seen(target) == sorted(OLD)
    assert seen(tmp_path / "*") == sorted(OLD)
    write(target, NEW, "next")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_names_are_deterministic_and_directory_is_complete(tmp_path):
    write(tmp_path / "out", OLD)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "_SUCCESS",
        "_schema.json",
        "part-00000.tfrecord",
        "part-00001.tfrecord",
    ]


def test_only_the_attempt_in_the_message_counts(tmp_path):
    job = WriteJob(tmp_path / "out", "job", True)
    stage(job, [b"good"])
    loser = StagedPart(0, 8, ".tfrecord")
    write_records(job.staged_path(loser), [pa.array([b"loser"], pa.large_binary())])
    job.commit([StagedPart(0, 7, ".tfrecord")], "{}")
    assert seen(job.target) == [b"good"]


def test_lost_staging_fails_and_keeps_the_old_data(tmp_path):
    target = tmp_path / "out"
    job = WriteJob(target, "slow", True)
    parts = stage(job, NEW)
    write(target, OLD, "fast")
    with pytest.raises(TFRecordError, match="one writer at a time"):
        job.commit(parts, "{}")
    job.abort()
    assert seen(target) == sorted(OLD)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_task_that_starts_after_the_abort_cannot_bring_the_staging_back(tmp_path):
    job = WriteJob(tmp_path / "out", "job", True)
    parts = stage(job, NEW)
    job.abort()
    with pytest.raises(TFRecordError, match="this job was aborted"):
        job.staged_path(parts[0])
    assert list(tmp_path.iterdir()) == []


def test_staged_file_that_another_node_kept_to_itself_is_missed(tmp_path):
    write(tmp_path / "out", OLD)
    job = WriteJob(tmp_path / "out", "job", True)
    parts = stage(job, NEW)
    job.staged_path(parts[1]).unlink()
    with pytest.raises(TFRecordError, match="partition 1, it is not there"):
        job.commit(parts, "{}")
    assert seen(job.target) == sorted(OLD)


@pytest.mark.parametrize("overwrite", [True, False])
def test_failing_commit_then_abort_restores(tmp_path, monkeypatch, overwrite):
    target = tmp_path / "out"
    write(target, OLD, "first")
    job = WriteJob(target, "job", overwrite)
    parts = stage(job, NEW)
    rename = Path.rename

    def failing(self, to):
        if self.name == "ready" or Path(to).name.startswith("part-00001-job"):
            raise OSError(5, "broken", str(to))
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="broken"):
            job.commit(parts, "{}")
    assert seen(target) == sorted(OLD)
    job.abort()
    assert seen(target) == sorted(OLD)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not list(target.glob("_append*"))
    assert len(list(target.glob("part-*"))) == 2


def test_journal_hides_its_files_from_every_kind_of_path(tmp_path):
    target = tmp_path / "out"
    write(target, OLD)
    journal = target / "_append-x.json"
    journal.write_text('{"files": ["part-00001.tfrecord"]}')
    assert seen(target) == [b"old 0"]
    assert seen(target / "part-*") == [b"old 0"]
    with pytest.raises(TFRecordError, match="found nothing"):
        data_files(str(target / "part-00001.tfrecord"))
    journal.write_text("not json")
    with pytest.raises(TFRecordError, match="journal"):
        data_files(str(target))


def test_leftover_that_cannot_be_removed_does_not_fail_the_commit(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(13, "denied", str(path))

    monkeypatch.setattr(commit.shutil, "rmtree", refuse)
    write(tmp_path / "out", NEW)
    assert seen(tmp_path / "out") == sorted(NEW)
    assert "could not be removed" in caplog.text


# Paths.


def test_uri_glob_and_file(tmp_path):
    for day in ("2024-01", "2024-02"):
        write(tmp_path / day, [day.encode()])
    spaced = tmp_path / "a b"
    write(spaced, [b"s"])
    assert seen(spaced.as_uri()) == [b"s"]
    assert seen(f"file:{tmp_path}/2024-01") == [b"2024-01"]
    assert seen(tmp_path / "2024-*" / "part-*") == [b"2024-01", b"2024-02"]
    assert seen(tmp_path / "2024-*") == [b"2024-01", b"2024-02"]
    assert seen(tmp_path / "2024-01" / "part-00000.tfrecord") == [b"2024-01"]
    hidden = tmp_path / "_hidden"
    shutil.copytree(spaced, hidden)
    assert b"s" not in seen(tmp_path / "*[!b]")
    bracket = tmp_path / "x[1]"
    write(bracket, [b"bracket"])
    assert seen(bracket) == [b"bracket"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3://bucket/x", ["'s3'", "/Volumes/"]),
        ("abfss://c@a.dfs.core.windows.net/x", ["'abfss'", "mounted"]),
        ("dbfs:/x", ["'dbfs'", "/dbfs/"]),
        (None, ["expected one path"]),
        ("/no/such/place", ["/no/such/place", "found nothing"]),
        ("/no/such/*", ["/no/such/*", "found nothing"]),
    ],
)
def test_path_that_cannot_be_read_is_explained(text, words):
    with pytest.raises(TFRecordError) as error:
        data_files(text)
    assert all(word in str(error.value) for word in words)


def test_empty_and_nested_directories_are_refused(tmp_path):
    with pytest.raises(TFRecordError, match="empty directory"):
        data_files(str(tmp_path))
    write(tmp_path / "day=1", OLD)
    with pytest.raises(TFRecordError, match="subdirectories are not searched"):
        data_files(str(tmp_path))
