"""A real `mlflow server` for tests: SQLite and proxied artifacts under one folder, on loopback, ended by its process id. Started again on
the same folder and port it goes on where it was."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.waiting import PATIENCE_S


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def mlflow_server(root: Path, port: int, artifacts: str | None = None, environ: dict[str, str] | None = None) -> Iterator[str]:
    """Start the server, wait until it is healthy, yield its address. artifacts: where files go, an `s3://` address or None for `root`."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{root}/mlflow.db", "--artifacts-destination", artifacts or str(root / "artifacts")]
    surroundings = {
        **os.environ,
        **(environ or {}),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    surroundings.pop("MLFLOW_TRACKING_URI", None)
    with (root / "server.log").open("ab") as log:
        server = subprocess.Popen(command, env=surroundings, stdout=log, stderr=log, cwd=root, start_new_session=True)
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(address, server, root / "server.log")
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(PATIENCE_S)


def _wait(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"mlflow server did not come up:\n{log.read_text()[-3000:]}")
