"""Promise: what the library says in a process of its own is heard where the process was started, and that process ends with its parent."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tasks.policies import in_own_process
from tests.waiting import PATIENCE_S, until

HOURS = """
import os, pathlib, time
def work(folder):
    pathlib.Path(folder, f"{os.getpid()}.pid").touch()
    time.sleep(3600)
"""
PARENT = """
import asyncio, signal, sys
from hours import work
from tasks.policies import in_own_process
def leave(number, frame):
    raise SystemExit(143)
signal.signal(signal.SIGTERM, leave)
asyncio.run(in_own_process(work, sys.argv[1]))
"""


def talking(number: int) -> int:
    """Stands for a library call."""
    logging.getLogger("stockpot.somewhere").info("half of %d is %d", number, number // 2)
    return number // 2


@pytest.mark.slow
def test_the_lines_of_another_process_are_told_before_its_answer():
    lines: list[str] = []
    assert asyncio.run(in_own_process(talking, 8, say=lines.append)) == 4
    assert lines == ["half of 8 is 4"]
    assert asyncio.run(in_own_process(talking, 6)) == 3
    assert len(lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_the_process_ends_with_its_parent(tmp_path, ending):
    """It could work for an hour, and hold a GPU."""
    (tmp_path / "hours.py").write_text(HOURS)
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=environ) as parent:
        (named,) = until(lambda: list(tmp_path.glob("*.pid")))
        parent.send_signal(ending)
        assert parent.wait(PATIENCE_S) == (143 if ending == signal.SIGTERM else -signal.SIGKILL)
    until(lambda: not psutil.pid_exists(int(named.stem)))
