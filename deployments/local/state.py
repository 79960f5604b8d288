"""What the stack keeps under its state directory, so that pages keep their addresses and data across restarts.

ports.json       chosen once, below the range the kernel gives to outgoing connections
s3.json          generated credentials of the object store (mode 600)
stack.json       the stack that is up: supervisor, mark, addresses, environment (mode 600)
stack.lock       held by the supervisor and its guardian; the kernel releases it
logs/            one per component, and the one before
prefect/ mlflow/ seaweedfs/ cache/      the data
"""

import fcntl
import json
import os
import random
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from deployments.local.guardian import sweep
from stockpot.errors import PortTaken, StackError, StackRunning

PORTS = (
    "prefect", "mlflow", "s3", "s3_grpc", "master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc",
)  # fmt: skip
RANGE = range(20_000, 32_000)


class Lock:
    """The exclusive right to run a stack on a state directory. The guardian inherits `handle`, and with it the lock."""

    def __init__(self, state: Path, wait_s: float = 15.0) -> None:
        """Raises `StackRunning` when a living supervisor holds it; waits while a dead one's guardian still clears up."""
        state.mkdir(parents=True, exist_ok=True)
        self.handle = os.open(state / "stack.lock", os.O_RDWR | os.O_CREAT, 0o600)
        end = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                running = read_running(state)
                if alive(running) or time.monotonic() > end:
                    os.close(self.handle)
                    raise StackRunning(_already(state, running)) from None
            time.sleep(0.1)

    def release(self) -> None:
        """Give it back."""
        os.close(self.handle)


def read_running(state: Path) -> dict[str, Any]:
    """What `stack.json` says of the stack that is, or was, up; empty where none was."""
    return _read_json(state / "stack.json")


def write_running(state: Path, running: dict[str, Any]) -> None:
    """Replace `stack.json` in one step."""
    _write_json(state / "stack.json", running)


def alive(running: dict[str, Any]) -> bool:
    """Whether the supervisor that wrote this still runs (its process id was not given to another, and it is not just waiting to be
    reaped)."""
    try:
        supervisor = psutil.Process(running["pid"]) if running else None
        return supervisor is not None and supervisor.create_time() == running["created"] and supervisor.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def clear_leftovers(state: Path) -> None:
    """End what an earlier stack left when its supervisor and guardian were both killed. Only for the holder of the lock."""
    if mark := read_running(state).get("mark"):
        if left := sweep(mark):
            raise StackError(f"Processes {left} of an earlier stack on {state} cannot be ended; end them, then start again.")
        (state / "stack.json").unlink()


def choose_ports(state: Path, asked: dict[str, int]) -> dict[str, int]:
    """A free port for every component: the one asked for, else the remembered one, else a new one. Raises `PortTaken` for one asked for."""
    require_free(asked)
    remembered = _read_json(state / "ports.json")
    ports: dict[str, int] = {}
    for name in PORTS:
        port = asked.get(name, remembered.get(name))
        while port is None or port in ports.values() or not _free(port):
            port = random.choice(RANGE)
        ports[name] = port
    _write_json(state / "ports.json", ports)
    return ports


def require_free(asked: dict[str, int]) -> None:
    """Raises `PortTaken` for a port that another process listens on."""
    for name, port in asked.items():
        if not _free(port):
            raise PortTaken(
                f"Port {port} was asked for {name}, but another process listens on it; end that process, or leave the port out."
            )


def credentials(state: Path) -> tuple[str, str]:
    """The object store's access key and secret, generated at the first call."""
    path = state / "s3.json"
    if not path.exists():
        key, secret = f"stockpot-{secrets.token_hex(6)}", secrets.token_urlsafe(30)
        identity = {"credentials": [{"accessKey": key, "secretKey": secret}], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        _write_json(path, {"identities": [{"name": "stockpot", **identity}]})
    written = _read_json(path)["identities"][0]["credentials"][0]
    return written["accessKey"], written["secretKey"]


def _already(state: Path, running: dict[str, Any]) -> str:
    if not running:
        return f"Another stack is just starting on {state}; wait for it, or choose another state directory."
    pages = ", ".join(f"{name} {address}" for name, address in running["addresses"].items())
    return f"A stack already runs on {state} (process {running['pid']}: {pages}); use it, or end it with `stockpot stack down`."


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StackError(f"{path} is not JSON ({error}); delete it, then start again.") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(value, file, indent=1)
    partial.rename(path)
