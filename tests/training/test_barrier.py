import json
import re
import socket
import time

import pytest

from recsys.config import Cluster
from training.attempt import Attempt
from training.barrier import _place, _reserved_port
from training.distribute import launch


@pytest.mark.spark
@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_lost_worker_is_noticed_and_the_launch_restarted(
    two_workers, launched, spark, tmp_path, caplog, how
):
    started = time.monotonic()
    launch(launched.stumble, two_workers, tmp_path, how, folder=tmp_path, spark=lambda: spark)
    assert time.monotonic() - started < 120
    assert len(list((tmp_path / "launch").iterdir())) == 2
    expected = {"kill": "killed by SIGKILL", "freeze": r"no sign of life for \d+ s"}[how]
    assert re.search(expected, caplog.text)
    assert Attempt(tmp_path / "launch" / "attempt-0001").is_abandoned()


def test_nobody_else_gets_a_reserved_port():
    with _reserved_port() as port, socket.socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        # TensorFlow's server may, with the same option.
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            server.bind(("", port))
            server.listen()
            socket.create_connection(("127.0.0.1", port)).close()


def test_each_rank_is_told_its_job_and_where_all_others_are():
    jobs = Cluster(kind="spark_parameter_server", servers=2).jobs(1)
    places = [json.loads(_place(jobs, ["a:1", "b:2", "c:3", "d:4"], rank)) for rank in range(4)]
    for place in places:
        assert place["cluster"] == {"chief": ["a:1"], "worker": ["b:2"], "ps": ["c:3", "d:4"]}
    assert [(p["task"]["type"], p["task"]["index"]) for p in places] == [
        ("chief", 0),
        ("worker", 0),
        ("ps", 0),
        ("ps", 1),
    ]
    alike = Cluster(kind="spark").jobs(2)
    assert json.loads(_place(alike, ["a:1", "b:2"], 1))["task"] == {"type": "worker", "index": 1}
