import pytest

import training.supervise
from recsys.config import Cluster
from training.attempt import WorkerError, WorkersLost
from training.supervise import supervise


@pytest.fixture
def waits(monkeypatch):
    seconds = []
    monkeypatch.setattr(training.supervise.time, "sleep", seconds.append)
    return seconds


def failing(*errors):
    """Raise one error per attempt, then succeed."""
    left = list(errors)

    def attempt():
        if left:
            raise left.pop(0)
        return "done"

    return attempt


def test_lost_workers_are_replaced_after_ever_longer_waits(waits):
    cluster = Cluster(max_restarts=3, restart_seconds=5)
    assert supervise(failing(*[WorkersLost("gone")] * 3), cluster, str) == "done"
    assert waits == [5, 10, 20]


def test_an_attempt_that_got_on_makes_the_count_and_the_wait_begin_anew(waits):
    cluster = Cluster(max_restarts=2, restart_seconds=5)
    newest = iter(["", "epoch-0001", "epoch-0001", "epoch-0002", "epoch-0002"])
    attempt = failing(*[WorkersLost("gone")] * 4)
    assert supervise(attempt, cluster, lambda: next(newest)) == "done"
    assert waits == [5, 10, 5, 10]


def test_the_last_checkpoint_made_anew_is_no_progress(waits):
    newest = iter(["epoch-0002", "epoch-0001", "epoch-0002", "epoch-0002"])
    with pytest.raises(WorkersLost, match="after 1 restarts in a row that saved nothing new"):
        supervise(failing(*[WorkersLost("x")] * 3), Cluster(max_restarts=1), lambda: next(newest))


def test_no_wait_is_longer_than_five_minutes(waits):
    cluster = Cluster(max_restarts=8, restart_seconds=60)
    supervise(failing(*[WorkersLost("gone")] * 8), cluster, str)
    assert max(waits) == 300


def test_it_gives_up_with_what_happened_last(waits):
    cluster = Cluster(max_restarts=1, restart_seconds=0)
    attempt = failing(WorkersLost("first"), WorkersLost("worker 1 on h: killed by SIGKILL"))
    with pytest.raises(WorkersLost, match=r"after 1 restarts .*: worker 1 on h: killed"):
        supervise(attempt, cluster, str)


@pytest.mark.parametrize("error", [WorkerError("ours"), ValueError("wrong")])
def test_other_errors_are_raised_at_once(waits, error):
    with pytest.raises(type(error), match=str(error)):
        supervise(failing(error), Cluster(), str)
    assert not waits
