"""A real `mlflow server`, which can be stopped and started again."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import requests

from training.tracking import TrackingError, check_reachable


class TrackingServer:
    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process = None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}"]
        place = ["--host", "127.0.0.1", "--port", str(self.port)]
        # Its jobs, which nobody asks for, are seven processes more.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                [*command, *store, *place],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            with suppress(requests.ConnectionError):
                requests.get(f"{self.uri}/health", timeout=10)
                return
            time.sleep(0.1)
        raise AssertionError((self._folder / "server.log").read_text())

    def stop(self):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # Its children may outlive it for a moment.
        with suppress(TrackingError):
            while True:
                check_reachable(self.uri)
                time.sleep(0.01)
