import pytest

from training.attempt import Attempt, Failure, WorkerError, WorkersLost


def failure(kind, rank, log):
    return Failure(kind=kind, rank=rank, host="h", log=log, message=f"{kind}!", trace="Traceback")


def test_the_cause_is_found_among_the_failures(tmp_path):
    attempt = Attempt.next_in(tmp_path)
    attempt.log(1).write_text("one\ntwo\n")
    assert str(attempt.diagnosis("Spark says so")) == "Spark says so"
    attempt.fail(failure("peer", 0, attempt.log(0)))
    assert isinstance(attempt.diagnosis(""), WorkersLost)
    attempt.fail(failure("outage", 3, attempt.log(3)))
    assert str(attempt.diagnosis("")) == f"worker 3 on h: outage! (log {attempt.log(3)}:0)"
    assert isinstance(attempt.diagnosis(""), WorkersLost)
    attempt.fail(failure("error", 1, attempt.log(1)))
    told = attempt.diagnosis("")
    assert isinstance(told, WorkerError)
    assert str(told) == f"worker 1 on h: error! (log {attempt.log(1)}:2)\nTraceback"
    attempt.fail(failure("lost", 2, attempt.log(2)))
    assert "worker 2 on h: lost!" in str(attempt.diagnosis(""))
    assert isinstance(attempt.diagnosis(""), WorkersLost)


def test_a_worker_that_cannot_say_so_runs_where_its_task_noted(tmp_path):
    attempt = Attempt.next_in(tmp_path)
    assert attempt.host(0) == "an unknown host"
    attempt.note_host(0, "10.0.0.7")
    assert attempt.host(0) == "10.0.0.7"
    (attempt.folder / "rank-1.host").touch()
    assert attempt.host(1) == "an unknown host"


def test_a_new_attempt_gives_the_earlier_ones_up(tmp_path):
    first = Attempt.next_in(tmp_path)
    assert not first.is_abandoned()
    second = Attempt.next_in(tmp_path)
    assert (first.folder.name, second.folder.name) == ("attempt-0001", "attempt-0002")
    assert first.is_abandoned()
    with pytest.raises(WorkersLost, match="left no"):
        second.result()
    second.succeed({"a": 1})
    assert second.result() == {"a": 1}
    assert second.sign(0) == ""
