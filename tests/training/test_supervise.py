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
    assert supervise(failing(*[WorkersLost("gone")] * 3), cluster) == "done"
    assert waits == [5, 10, 20]


def test_no_wait_is_longer_than_five_minutes(waits):
    cluster = Cluster(max_restarts=8, restart_seconds=60)
    supervise(failing(*[WorkersLost("gone")] * 8), cluster)
    assert max(waits) == 300


def test_it_gives_up_with_what_happened_last(waits):
    cluster = Cluster(max_restarts=1, restart_seconds=0)
    attempt = failing(WorkersLost("first"), WorkersLost("worker 1 on h: killed by SIGKILL"))
    with pytest.raises(WorkersLost, match=r"after 1 restarts .*: worker 1 on h: killed"):
        supervise(attempt, cluster)


@pytest.mark.parametrize("error", [WorkerError("ours"), ValueError("wrong")])
def test_other_errors_are_raised_at_once(waits, error):
    with pytest.raises(type(error), match=str(error)):
        supervise(failing(error), Cluster())
    assert not waits
