"""The local stack: Prefect, MLflow and SeaweedFS, with a worker for each pool, as supervised children on 127.0.0.1. The real
servers, small: SQLite where a shared installation has PostgreSQL, and nothing else different.

    with local_stack(Path(".stockpot")) as stack:      # ready when the block begins, gone when it ends
        os.environ.update(stack.environ)

`start_detached` and `stop` do the same for a person's `stockpot stack up` and `down`. The parts are in `deployments/local/`.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from deployments.local import components, guardian
from deployments.local.prefect_api import crash_interrupted_runs, make_pool, worker_online
from deployments.local.processes import Supervisor, answers
from deployments.local.state import Lock, alive, choose_ports, clear_leftovers, credentials, read_running, require_free, write_running
from stockpot.errors import StackError

READY_S = 600.0
"""Deadline for the whole start. A first start makes two databases, on two slow cores in about 30 s."""


class Stack:
    """A stack that is up. `environ`: the standard names, the homes under the state directory, and the mark by which a process started
    with them ends with the stack. `addresses`: the pages for a person."""

    def __init__(self, supervisor: Supervisor, environ: dict[str, str]) -> None:
        self.environ = environ
        self.addresses = pages(environ)
        self._supervisor = supervisor

    @property
    def pids(self) -> dict[str, int]:
        """Component to process id."""
        return self._supervisor.pids

    def check(self) -> None:
        """Raises `StackError`, with its last log lines, when a server has died."""
        for sentence in self._supervisor.dead.values():
            raise StackError(sentence)


@contextmanager
def local_stack(
    state: Path, *, workers: bool = True, ports: dict[str, int] | None = None, say: Callable[[str], None] | None = None
) -> Iterator[Stack]:
    """Run the stack on a state directory while the block runs.

    `ports` asks for particular ports by component (`prefect`, `mlflow`, `s3`); `say` is told of a component that dies (default:
    standard error). Raises `StackRunning`, `PortTaken`, or `StackError` when a component does not become ready. SIGTERM and
    SIGHUP end the block like Ctrl-C does.
    """
    state = state.resolve()
    _require_free(state, ports or {})
    lock = Lock(state)
    try:
        with _ending_on_signals():
            clear_leftovers(state)
            chosen = choose_ports(state, ports or {})
            environ = components.endpoints(chosen, *credentials(state))
            mark = secrets.token_hex(8)
            me = {"pid": os.getpid(), "created": psutil.Process().create_time()}
            running = {**me, "mark": mark, "environ": environ, "addresses": pages(environ)}
            write_running(state, running)

            def changed(pids: dict[str, int]) -> None:
                running["components"] = pids
                write_running(state, running)

            supervisor = Supervisor(state, mark, lock.handle, died=say or _to_stderr, changed=changed)
            try:
                _start(supervisor, state, chosen, environ, workers)
                running["ready"] = True  # kept in what `changed` writes when a worker is started again
                write_running(state, running)
                yield Stack(supervisor, environ | components.homes(state) | {guardian.MARK: mark})
            finally:
                with _undisturbed():
                    supervisor.end()
                    (state / "stack.json").unlink(missing_ok=True)
    finally:
        lock.release()


def start_detached(state: Path, *, ports: dict[str, int] | None = None) -> dict[str, str]:
    """Start the stack in the background and return its environment once it is ready. Raises what `local_stack` raises."""
    state = state.resolve()
    _require_free(state, ports or {})
    (state / "logs").mkdir(parents=True, exist_ok=True)
    with (state / "logs" / "stack.log").open("ab") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "deployments.local.daemon", str(state), json.dumps(ports or {})],
            cwd=components.ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    assert daemon.stdout is not None
    with daemon.stdout:
        try:
            said = daemon.stdout.readline()
        except KeyboardInterrupt:
            daemon.terminate()
            daemon.wait()
            raise
    if not said:
        raise StackError(f"The stack's supervisor ended without a word; see {state / 'logs' / 'stack.log'}.")
    answer = json.loads(said)
    if "error" in answer:
        daemon.wait()
        raise _named(answer["kind"])(answer["error"])
    return running_environ(state)


def running_environ(state: Path) -> dict[str, str]:
    """The environment of the stack that is up on this state directory, or an empty one."""
    running = read_running(state)
    return dict(running["environ"]) if alive(running) and running.get("ready") else {}


def stop(state: Path, timeout_s: float = 60.0) -> bool:
    """End the stack that is up, wherever it was started; False when none is. Raises `StackError` when processes are left."""
    running = read_running(state)
    if not alive(running):
        return False
    supervisor = psutil.Process(running["pid"])
    with suppress(psutil.NoSuchProcess):
        supervisor.terminate()
        try:
            supervisor.wait(timeout_s)
        except psutil.TimeoutExpired:
            supervisor.kill()  # its guardian does the rest
    end = time.monotonic() + guardian.SWEEP_S
    while guardian.marked(running["mark"]) and time.monotonic() < end:
        time.sleep(0.1)
    if left := guardian.marked(running["mark"]):
        raise StackError(f"Processes {left} of the stack on {state} are still there; end them by hand.")
    return True


def health(state: Path) -> dict[str, dict[str, Any]]:
    """Component to `{pid, ok}` of the stack that is up; empty when none is."""
    running = read_running(state)
    if not alive(running):
        return {}
    urls = components.health_urls(running["environ"])
    there = guardian.marked(running["mark"])

    def ok(name: str, pid: int) -> bool:
        return pid in there and (name not in urls or answers(urls[name]))

    return {name: {"pid": pid, "ok": ok(name, pid)} for name, pid in running.get("components", {}).items()}


def pages(environ: dict[str, str]) -> dict[str, str]:
    """What a person opens in a browser, and the object store's address."""
    return {
        "Prefect": environ["PREFECT_API_URL"].removesuffix("/api"),
        "MLflow": environ["MLFLOW_TRACKING_URI"],
        "S3": environ["AWS_ENDPOINT_URL"],
    }


def _require_free(state: Path, ports: dict[str, int]) -> None:
    """Refuse ports that are taken before a folder is made; a stack that is up on this state has them rightly, and is named instead."""
    if not alive(read_running(state)):
        require_free(ports)


def _start(supervisor: Supervisor, state: Path, ports: dict[str, int], environ: dict[str, str], workers: bool) -> None:
    """The three servers at once, each other part as soon as what it needs is there."""
    deadline = time.monotonic() + READY_S
    s3 = {name: value for name, value in environ.items() if name.startswith("AWS_")}
    urls, api = components.health_urls(environ), environ["PREFECT_API_URL"]
    supervisor.start(components.object_store(state, ports))
    supervisor.start(components.prefect_server(state, ports))
    supervisor.start(components.mlflow_server(state, ports, s3))
    supervisor.wait("seaweedfs", lambda: answers(urls["seaweedfs"]), deadline)
    supervisor.wait("seaweedfs", lambda: components.has_buckets(environ), deadline)
    supervisor.wait("prefect", lambda: answers(urls["prefect"]), deadline)
    crash_interrupted_runs(api)
    for pool in components.POOLS:
        make_pool(api, pool, components.pool_template())
    if workers:
        supervisor.start(components.worker("control", None, state, environ))
        supervisor.start(components.worker("gpu", components.trials_at_once(), state, environ))
    supervisor.wait("mlflow", lambda: answers(urls["mlflow"]), deadline)
    for pool in components.POOLS if workers else ():
        supervisor.wait(f"worker-{pool}", partial(worker_online, api, pool), deadline)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the block as Ctrl-C does, also where a shell had SIGINT ignored (children would inherit that)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    if before[signal.SIGINT] == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold signals back while the stack is taken down; it takes seconds."""
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)


def _named(kind: str) -> type[StackError]:
    """The class of the family that the supervisor's error had."""
    return next((one for one in StackError.__subclasses__() if one.__name__ == kind), StackError)


def _to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
