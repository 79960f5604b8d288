"""Promise: the demo can be killed at any moment, in any way, and started again; nothing it started stays behind, and the run that is
left alone ends with a registered soup. Minutes long, so `make proof` runs it, not `make test`."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deployments.deploying import ROOT
from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.proof, pytest.mark.timeout(3000)]


def start_demo(folder):
    environ = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
    with (folder / "demo.log").open("ab") as log:
        command = [sys.executable, "-m", "deployments.cli", "demo"]
        environ["PYTHONPATH"] = str(ROOT)
        return subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def left_behind(folder):
    """Processes that carry the folder in their command line or environment."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            if process.pid != os.getpid() and (str(folder) in " ".join(process.info["cmdline"] or ()) or process.cwd() == str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_the_demo_survives_being_killed_anywhere(tmp_path):
    rng = random.Random(7)
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        demo = start_demo(tmp_path)
        time.sleep(rng.uniform(5, 150))
        if demo.poll() is None:
            demo.send_signal(how)
        demo.wait(timeout=PATIENCE_S)
        end = time.monotonic() + PATIENCE_S
        while left_behind(tmp_path) and time.monotonic() < end:
            time.sleep(0.5)
        assert left_behind(tmp_path) == [], f"after {how.name}"

    demo = start_demo(tmp_path)
    assert demo.wait(timeout=1500) == 0, (tmp_path / "demo.log").read_text()[-2000:]
    figures = json.loads((tmp_path / ".stockpot" / "demo.json").read_text())
    assert figures["finished"] == figures["trials"]
    assert (figures["version"], figures["alias"]) == (1, "champion")
    assert left_behind(tmp_path) == []
    shutil.rmtree(Path(tmp_path) / ".stockpot")
