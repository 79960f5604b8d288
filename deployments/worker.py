"""A Prefect worker whose flow runs leave before it does: `python -m deployments.worker` takes the options of `prefect worker start`.

At SIGTERM Prefect's own (3.8.8) kills the processes of its flow runs as it goes, and a trial is gone before its state is saved. The signal
must reach this process alone, as from Docker and Kubernetes; under systemd with `KillMode=mixed`. Ctrl-C and a closed terminal do the same:
the worker has a session of its own, and would otherwise go on taking trials.
"""

import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil

GRACE_S = 45.0
"""How long flow runs may take to leave; less than the minute their container has."""

LEAVING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The first of them makes the worker leave; further ones change nothing."""

LOOK_S = 0.2
"""How often it is asked whether the worker has ended by itself."""


def leave(worker: psutil.Process, grace_s: float = GRACE_S) -> None:
    """End a worker: its flow runs first, each told by SIGTERM and waited for, then the worker itself. It stands still meanwhile, or
    it would start its next flow runs in the places that come free."""
    with suppress(psutil.NoSuchProcess):  # it may have ended by itself
        _leave(worker, grace_s)


def _leave(worker: psutil.Process, grace_s: float) -> None:
    worker.suspend()
    flow_runs = worker.children()  # not theirs: a trial's loaders and ranks leave with it
    for one in flow_runs:
        with suppress(psutil.NoSuchProcess):
            one.terminate()
    end = time.monotonic() + grace_s
    while any(map(_lives, flow_runs)) and time.monotonic() < end:
        time.sleep(0.1)
    worker.terminate()
    worker.resume()


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def main(command: list[str]) -> int:
    """Run the worker until it ends, or is told to by one of `LEAVING`; returns its exit code."""
    told = threading.Event()
    for number in LEAVING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda _number, _frame: told.set())
    worker = subprocess.Popen(command, start_new_session=True)
    while worker.poll() is None:
        if told.wait(LOOK_S):
            leave(psutil.Process(worker.pid))
            return worker.wait()
    return worker.returncode


if __name__ == "__main__":
    raise SystemExit(main([sys.executable, "-m", "prefect", "worker", "start", *sys.argv[1:]]))
