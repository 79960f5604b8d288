"""A registered version over HTTP, as the README does it: `mlflow models serve` on a free port of loopback, asked about a picture, ended."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.local.processes import answers
from stockpot.errors import StockpotError

READY_S = 120.0


@dataclass(frozen=True)
class Service:
    """A model's server, starting or up."""

    address: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def wait(self) -> None:
        """Until it answers. Raises `StockpotError` when it ends instead, or takes longer than `READY_S`."""
        end = time.monotonic() + READY_S
        while not answers(f"{self.address}/ping"):
            if self.process.poll() is not None or time.monotonic() > end:
                raise StockpotError(f"`mlflow models serve` did not come up within {READY_S:.0f} s; its words are in {self.log}.")
            time.sleep(0.2)

    def ask(self, picture: bytes) -> dict[str, Any]:
        """What it says about the bytes of one picture: a label, how sure it is, and the likeliest classes."""
        body = json.dumps({"dataframe_records": [{"image": base64.b64encode(picture).decode()}]}).encode()
        request = urllib.request.Request(f"{self.address}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)["predictions"][0]
        return answer


@contextmanager
def serving(model: str, log: Path) -> Iterator[Service]:
    """The server of `models:/digits@champion`, which is still starting when the block begins and gone when it ends. Where this process is
    killed it ends with the stack, whose mark it carries."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # MLflow calls `uvicorn` by name
    environ = {**os.environ, "PATH": path, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environ, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield Service(f"http://127.0.0.1:{port}", process, log)
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, how)
            process.wait(20)
            return
