import json
import socket

import pytest

from recsys.config import Cluster
from training.barrier import _place, _reserved_port


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
