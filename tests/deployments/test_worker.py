"""Promise: a worker that is told to go lets its flow runs leave first, though by itself it would kill them on its way, and
starts no other."""

import signal
import subprocess
import sys
import time

import pytest

from tests.waiting import PATIENCE_S, until

FLOW_RUN = """
import pathlib, signal, sys, time
def leave(number, frame):
    time.sleep(0.5)
    pathlib.Path(sys.argv[1], "saved").write_text("state")
    raise SystemExit(143)
signal.signal(signal.SIGTERM, leave)
pathlib.Path(sys.argv[1], "running").touch()
time.sleep(600)
"""
WORKER = """
import pathlib, signal, subprocess, sys
flow_run = subprocess.Popen([sys.executable, *sys.argv[1:]])
def leave(number, frame):
    flow_run.kill()
    raise SystemExit(3)
signal.signal(signal.SIGTERM, leave)
flow_run.wait()
pathlib.Path(sys.argv[-1], "next").touch()
signal.pause()
"""
SUPERVISED = """
import signal, sys
from deployments.worker import LEAVING, main
for number in LEAVING:
    signal.signal(number, signal.SIG_DFL)  # a shell ignores SIGINT for what it runs in the background
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_flow_runs_leave_before_the_worker(tmp_path, asked):
    command = [sys.executable, "-c", WORKER, "-c", FLOW_RUN, str(tmp_path)]
    with subprocess.Popen([sys.executable, "-c", SUPERVISED, *command]) as supervised:
        until((tmp_path / "running").exists)
        supervised.send_signal(asked)
        time.sleep(0.2)
        supervised.send_signal(asked)  # an impatient person's second Ctrl-C
        assert supervised.wait(PATIENCE_S) == 3
    assert (tmp_path / "saved").read_text() == "state"
    assert not (tmp_path / "next").exists()
