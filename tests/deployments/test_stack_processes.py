"""Promises: a worker that dies is started again, a server that dies is reported with its last log lines, and whatever way the
supervisor ends, SIGKILL included, none of its processes or their children is left. Real processes, small ones."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deployments.local import guardian
from deployments.local.components import ROOT, Component
from deployments.local.processes import Supervisor
from deployments.local.state import Lock, alive, clear_leftovers, write_running
from stockpot.errors import StackError
from tests.waiting import PATIENCE_S, until

SLEEPER = "import time; time.sleep(600)"
FAMILY = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-S", "-c", "import os; os.setsid(); os.fork(); {SLEEPER}"])
{SLEEPER}
"""
"""A component whose child leaves its session and forks: what a worker's flow runs may do."""


def python(name: str, code: str, *, restarted: bool = False) -> Component:
    return Component(name, (sys.executable, "-S", "-c", code), restarted=restarted)


class Stand:
    """A supervisor with what it said."""

    def __init__(self, state: Path) -> None:
        self.said: list[str] = []
        self.mark = secrets.token_hex(8)
        self.lock = Lock(state)
        self.supervisor = Supervisor(state, self.mark, self.lock.handle, died=self.said.append, changed=lambda _pids: None)


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    made = Stand(tmp_path)
    yield made
    made.supervisor.end()
    made.lock.release()
    assert guardian.marked(made.mark) == []


def test_a_killed_worker_is_started_again(stand: Stand) -> None:
    stand.supervisor.start(python("worker-gpu", SLEEPER, restarted=True))
    first = stand.supervisor.pids["worker-gpu"]
    os.kill(first, signal.SIGKILL)
    until(lambda: stand.supervisor.pids.get("worker-gpu", first) != first)
    assert "worker-gpu ended by signal SIGKILL" in stand.said[0]
    assert "It is started again in 1 s." in stand.said[0]


def test_a_worker_that_keeps_dying_is_started_ever_later(stand: Stand) -> None:
    stand.supervisor.start(python("worker-gpu", "raise SystemExit(3)", restarted=True))
    until(lambda: len(stand.said) >= 2)
    assert "with exit code 3" in stand.said[0]
    assert [said.rsplit(" in ", 1)[1] for said in stand.said[:2]] == ["1 s.", "2 s."]


def test_a_server_that_dies_is_reported_with_its_last_lines(stand: Stand, tmp_path: Path) -> None:
    stand.supervisor.start(python("mlflow", "print('first'); print('the disk is full'); raise SystemExit(1)"))
    with pytest.raises(StackError, match=r"(?s)mlflow ended with exit code 1; its last lines: \n    first\n    the disk is full\n"):
        stand.supervisor.wait("mlflow", lambda: False, time.monotonic() + PATIENCE_S)
    assert str(tmp_path / "logs" / "mlflow.log") in stand.said[0]
    assert "stockpot stack down" in stand.said[0]


def test_a_component_that_never_becomes_ready_is_reported(stand: Stand) -> None:
    stand.supervisor.start(python("prefect", f"print('migrating', flush=True); {SLEEPER}"))
    until((stand.supervisor.logs / "prefect.log").read_text)
    with pytest.raises(StackError, match=r"(?s)prefect did not become ready in time; its last lines: \n    migrating"):
        stand.supervisor.wait("prefect", lambda: False, time.monotonic() + 0.2)


def test_the_log_of_the_time_before_is_kept(stand: Stand) -> None:
    (stand.supervisor.logs / "mlflow.log").write_text("yesterday")
    stand.supervisor.start(python("mlflow", SLEEPER))
    assert (stand.supervisor.logs / "mlflow.before.log").read_text() == "yesterday"


def test_the_end_takes_grandchildren_in_other_sessions_too(stand: Stand) -> None:
    stand.supervisor.start(python("worker-gpu", FAMILY, restarted=True))
    until(lambda: len(guardian.marked(stand.mark)) == 3)
    stand.supervisor.end()
    assert guardian.marked(stand.mark) == []


def test_flow_runs_leave_before_their_worker_is_ended(stand: Stand, tmp_path: Path) -> None:
    flow_run = f"""
import signal, time
def leave(number, frame):
    time.sleep(0.3)
    open({str(tmp_path / "saved")!r}, "w").close()
    raise SystemExit
signal.signal(signal.SIGTERM, leave)
print("running", flush=True)
time.sleep(600)
"""
    worker = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {flow_run!r}])"
    stand.supervisor.start(python("worker-gpu", worker, restarted=True))
    until((stand.supervisor.logs / "worker-gpu.log").read_text)
    stand.supervisor.end()
    assert (tmp_path / "saved").exists()


def test_a_component_that_ignores_sigterm_is_killed(stand: Stand) -> None:
    stand.supervisor.start(python("mlflow", f"import signal; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); {SLEEPER}"))
    until((stand.supervisor.logs / "mlflow.log").read_text)
    began = time.monotonic()
    stand.supervisor.end()
    assert time.monotonic() - began < 60
    assert guardian.marked(stand.mark) == []


def test_a_killed_guardian_is_replaced(stand: Stand) -> None:
    first = stand.supervisor._guardian.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: stand.supervisor._guardian.pid != first)


SUPERVISE = """
import sys, signal
from pathlib import Path
from deployments.local.components import Component
from deployments.local.processes import Supervisor
from deployments.local.state import Lock
state, mark, family = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
supervisor = Supervisor(state, mark, Lock(state).handle, died=print, changed=lambda pids: None)
supervisor.start(Component("worker-gpu", (sys.executable, "-S", "-c", family), restarted=True))
print(supervisor._guardian.pid, flush=True)
signal.pause()
"""


@pytest.fixture
def supervising(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """A supervisor in a process of its own, the mark of its family of three, and its guardian."""
    mark = secrets.token_hex(8)
    process = subprocess.Popen([sys.executable, "-c", SUPERVISE, str(tmp_path), mark, FAMILY], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        with process.stdout:
            watcher = int(process.stdout.readline())
        until(lambda: len(guardian.marked(mark)) == 3)
        yield process, mark, watcher
    finally:
        process.kill()
        process.wait()
        guardian.sweep(mark)


def test_sigkill_of_the_supervisor_leaves_nothing(supervising: tuple[subprocess.Popen[str], str, int], tmp_path: Path) -> None:
    process, mark, watcher = supervising
    process.kill()
    process.wait()
    until(lambda: guardian.marked(mark) == [])
    until(lambda: not psutil.pid_exists(watcher))
    Lock(tmp_path, wait_s=0).release()


def test_no_new_stack_starts_before_the_guardian_of_a_killed_one_is_done(
    supervising: tuple[subprocess.Popen[str], str, int], tmp_path: Path
) -> None:
    process, mark, _ = supervising
    process.kill()
    Lock(tmp_path).release()
    assert guardian.marked(mark) == []
    process.wait()


def test_leftovers_of_a_stack_whose_guardian_was_killed_too_are_cleared_by_the_next(
    supervising: tuple[subprocess.Popen[str], str, int], tmp_path: Path
) -> None:
    process, mark, watcher = supervising
    os.kill(process.pid, signal.SIGSTOP)  # or it would replace its guardian
    os.kill(watcher, signal.SIGKILL)
    process.kill()
    process.wait()
    assert len(guardian.marked(mark)) == 3
    write_running(tmp_path, {"pid": process.pid, "created": 0.0, "mark": mark})
    assert not alive({"pid": process.pid, "created": 0.0})
    lock = Lock(tmp_path)
    clear_leftovers(tmp_path)
    lock.release()
    assert guardian.marked(mark) == []


def test_ports_of_killed_processes_are_free_at_once(stand: Stand) -> None:
    listen = "import socket, time; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(s.getsockname()[1], flush=True)"
    stand.supervisor.start(python("mlflow", f"held = bytearray(2**28); {listen}; {SLEEPER}"))
    until((stand.supervisor.logs / "mlflow.log").read_text)
    port = int((stand.supervisor.logs / "mlflow.log").read_text())
    assert guardian.sweep(stand.mark) == []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
