"""Starting, watching and ending the stack's processes. One thread watches; whatever way the supervisor goes, `guardian.py` sweeps."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from deployments.local import guardian
from deployments.local.components import ROOT, Component, surroundings
from deployments.worker import leave
from stockpot.errors import StackError

WATCH_S = 0.25
BACK_OFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
STEADY_S = 60.0
"""A worker that ran this long starts again without delay."""
LAST_LINES = 8
LEAVE_S = 15.0
"""How long a worker's flow runs may take to leave: a trial to save its state, a flow run to say how it ended."""


class Supervisor:
    """The processes of one stack. `died` is called with a sentence for each component that dies unasked, `changed` with component
    to process id whenever one was started; neither may raise."""

    def __init__(
        self, state: Path, mark: str, lock: int, *, died: Callable[[str], None], changed: Callable[[dict[str, int]], None]
    ) -> None:
        self.logs = state / "logs"
        self.logs.mkdir(exist_ok=True)
        self.mark = mark
        self.died = died
        self.changed = changed
        self.dead: dict[str, str] = {}
        self._components: dict[str, Component] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._began: dict[str, float] = {}
        self._falls: dict[str, int] = {}
        self._due: dict[str, float] = {}
        self._changing = threading.RLock()
        self._ending = threading.Event()
        self._guardian = self._start_guardian(lock)
        self._lock_handle = lock
        self._watcher = threading.Thread(target=self._watch, name="stack-watcher", daemon=True)
        self._watcher.start()

    @property
    def pids(self) -> dict[str, int]:
        """Component to process id, of those that run."""
        with self._changing:
            return {name: process.pid for name, process in self._running.items()}

    def start(self, component: Component) -> None:
        """Start it, in a session of its own so that a terminal's Ctrl-C reaches only the supervisor."""
        log = self.logs / f"{component.name}.log"
        with self._changing:
            if component.name not in self._components and log.exists():
                log.replace(log.with_suffix(".before.log"))
            self._components[component.name] = component
            with log.open("ab") as file:
                self._running[component.name] = subprocess.Popen(
                    component.argv,
                    env=surroundings() | component.environ | {guardian.MARK: self.mark},
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._began[component.name] = time.monotonic()
            self.changed({name: process.pid for name, process in self._running.items()})

    def wait(self, name: str, ready: Callable[[], bool], deadline: float) -> None:
        """Poll until a component is ready. Raises `StackError` with its last log lines when it dies for good, or at `deadline`."""
        while not ready():
            for sentence in self.dead.values():
                raise StackError(sentence)
            if time.monotonic() > deadline:
                raise StackError(f"{name} did not become ready in time; its last lines: {self._last_lines(name)}")
            time.sleep(0.1)

    def end(self) -> None:
        """End everything: workers first, so that trials save their states and none starts, then the servers; whatever has not gone in
        time is killed."""
        self._ending.set()
        self._watcher.join()
        workers = [name for name, component in self._components.items() if component.restarted]
        self._end(workers, _leave, grace_s=2.0)
        self._end([name for name in self._running if name not in workers], subprocess.Popen.terminate, grace_s=2.0)
        left = guardian.sweep(self.mark)
        for process in self._running.values():
            process.wait()
        for component in self._components.values():
            for socket in component.sockets:
                Path(socket).unlink(missing_ok=True)
        self._guardian.kill()
        self._guardian.wait()
        if left:
            raise StackError(f"Processes {left} of the stack could not be ended.")

    def _start_guardian(self, lock: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), self.mark],
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(lock,),
            start_new_session=True,
        )

    def _watch(self) -> None:
        while not self._ending.wait(WATCH_S):
            with self._changing:
                if self._guardian.poll() is not None:
                    self._guardian = self._start_guardian(self._lock_handle)
                for name, process in list(self._running.items()):
                    if process.poll() is not None:
                        self._fell(name, process.returncode)
                for name in [name for name, due in self._due.items() if time.monotonic() >= due]:
                    del self._due[name]
                    self.start(self._components[name])

    def _fell(self, name: str, code: int) -> None:
        del self._running[name]
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        sentence = f"{name} ended {how}; its last lines: {self._last_lines(name)}"
        if self._components[name].restarted:
            steady = time.monotonic() - self._began[name] > STEADY_S
            self._falls[name] = 0 if steady else self._falls.get(name, -1) + 1
            wait_s = BACK_OFF_S[min(self._falls[name], len(BACK_OFF_S) - 1)]
            self._due[name] = time.monotonic() + wait_s
            self.died(f"{sentence}\nIt is started again in {wait_s:.0f} s.")
        else:
            self.dead[name] = f"{sentence}\nThe stack cannot go on without it: end it with `stockpot stack down`, then start it again."
            self.died(self.dead[name])

    def _last_lines(self, name: str) -> str:
        path = self.logs / f"{name}.log"
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()][-LAST_LINES:]
        return "".join(f"\n    {line}" for line in lines or ["(it wrote none)"]) + f"\n    ({path})"

    def _end(self, names: list[str], tell: Callable[[subprocess.Popen[bytes]], None], grace_s: float) -> None:
        for name in names:
            if name in self._running:
                with suppress(ProcessLookupError, psutil.NoSuchProcess):
                    tell(self._running[name])
        end = time.monotonic() + grace_s
        for name in names:
            if name in self._running:
                with suppress(subprocess.TimeoutExpired):
                    self._running[name].wait(max(0.0, end - time.monotonic()))


def _leave(worker: subprocess.Popen[bytes]) -> None:
    leave(psutil.Process(worker.pid), LEAVE_S)


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """Whether a GET is answered with 2xx."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as response:
            return bool(200 <= response.status < 300)
    except (urllib.error.URLError, OSError):
        return False
