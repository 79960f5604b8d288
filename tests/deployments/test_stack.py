"""Promises about the real stack: it starts twice and keeps what it holds, dead parts are shown and workers come back, and a
SIGKILL of its supervisor takes every process with it, the flow runs of its workers included. Minutes on two cores."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from deployments import stack
from deployments.local import guardian
from deployments.local.components import ROOT
from deployments.local.prefect_api import post
from deployments.local.state import Lock, alive, read_running
from stockpot.errors import StackError, StackRunning
from tests.waiting import PATIENCE_S, until

pytestmark = [pytest.mark.stack, pytest.mark.timeout(2400)]

NAP = "import time\nfrom prefect import flow\n\n@flow\ndef nap():\n    time.sleep(600)\n"


def stockpot(*words: str) -> subprocess.CompletedProcess[str]:
    """The command line, with no address in its environment."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "AWS_"))}
    command = [sys.executable, "-c", "from deployments.cli import main; main()", *words]
    return subprocess.run(command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state directory on which nothing is left running."""
    path = tmp_path / "state"
    yield path
    running = read_running(path)
    if alive(running):
        os.kill(running["pid"], signal.SIGKILL)
    if running:
        until(lambda: guardian.marked(running["mark"]) == [])


def object_store(environ: dict[str, str]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=environ["AWS_ENDPOINT_URL"],
        aws_access_key_id=environ["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environ["AWS_SECRET_ACCESS_KEY"],
        region_name=environ["AWS_DEFAULT_REGION"],
    )


def ledger(environ: dict[str, str], call: str, body: dict[str, Any]) -> Any:
    return post(f"{environ['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/{call}", body)


def start_nap(api: str, folder: Path) -> str:
    """A flow run on pool `gpu` that sleeps; returns its id once it runs."""
    (folder / "nap.py").write_text(NAP)
    flow = post(f"{api}/flows/", {"name": "nap"})
    where = {"entrypoint": "nap.py:nap", "path": str(folder), "job_variables": {"working_dir": str(folder)}}
    deployment = post(f"{api}/deployments/", {"name": "nap", "flow_id": flow["id"], "work_pool_name": "gpu", **where})
    run = post(f"{api}/deployments/{deployment['id']}/create_flow_run", {})
    until(lambda: flow_run(api, run["id"])["state_type"] == "RUNNING")
    return str(run["id"])


def flow_run(api: str, run_id: str) -> Any:
    return post(f"{api}/flow_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})[0]


@pytest.mark.slow
def test_a_person_starts_it_twice_and_finds_everything_again(state: Path, tmp_path: Path) -> None:
    up = stockpot("stack", "up", "--state", str(state), "--json")
    assert up.returncode == 0, up.stderr
    environ = stack.running_environ(state)
    object_store(environ).put_object(Bucket="stockpot", Key="kept", Body=b"soup")
    ledger(environ, "experiments/create", {"name": "kept"})
    first = read_running(state)

    again = stockpot("stack", "up", "--state", str(state))
    assert again.returncode == 1
    assert environ["MLFLOW_TRACKING_URI"] in again.stderr
    assert "Traceback" not in again.stderr
    with pytest.raises(StackRunning):
        stack.start_detached(state)

    down = stockpot("stack", "down", "--state", str(state))
    assert (down.returncode, guardian.marked(first["mark"])) == (0, [])
    status = stockpot("stack", "status", "--state", str(state))
    assert (status.returncode, status.stderr.strip()) == (1, f"No stack is up on {state}; start one with `stockpot stack up`.")

    assert json.loads(up.stdout) == stack.pages(stack.start_detached(state))
    assert stack.running_environ(state) == environ
    assert object_store(environ).get_object(Bucket="stockpot", Key="kept")["Body"].read() == b"soup"
    assert "kept" in [one["name"] for one in ledger(environ, "experiments/search", {"max_results": 10})["experiments"]]

    parts = json.loads(stockpot("stack", "status", "--state", str(state), "--json").stdout)["components"]
    assert {name for name, part in parts.items() if part["ok"]} == {"seaweedfs", "mlflow", "prefect", "worker-control", "worker-gpu"}
    os.kill(parts["worker-gpu"]["pid"], signal.SIGKILL)
    until(lambda: stack.health(state)["worker-gpu"]["pid"] != parts["worker-gpu"]["pid"])
    assert stack.running_environ(state) == environ

    api = environ["PREFECT_API_URL"]
    run = start_nap(api, tmp_path)
    os.kill(parts["mlflow"]["pid"], signal.SIGKILL)
    until(lambda: "mlflow ended by signal SIGKILL; its last lines:" in (state / "logs" / "stack.log").read_text())
    broken = stockpot("stack", "status", "--state", str(state))
    assert broken.returncode == 1
    assert "mlflow of the stack" in broken.stderr

    running = read_running(state)
    assert len(guardian.marked(running["mark"])) > len(parts)
    os.kill(running["pid"], signal.SIGKILL)
    until(lambda: guardian.marked(running["mark"]) == [])

    with stack.local_stack(state, workers=False) as third:
        ended = flow_run(api, run)
        assert third.environ["PREFECT_API_URL"] == api
        assert object_store(third.environ).get_object(Bucket="stockpot", Key="kept")["Body"].read() == b"soup"
        assert (ended["state_type"], ended["state"]["message"]) == ("CRASHED", "The local stack was stopped while this ran.")
    assert guardian.marked(third.environ[guardian.MARK]) == []


def test_a_start_that_fails_says_why_and_leaves_nothing(state: Path) -> None:
    (state / "mlflow").mkdir(parents=True)
    (state / "mlflow" / "mlflow.db").write_text("this is no database, " * 100)
    with pytest.raises(StackError, match=r"(?s)mlflow ended with exit code 1; its last lines: .*file is not a database"):
        stack.start_detached(state)
    assert read_running(state) == {}
    Lock(state, wait_s=0).release()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_it_starts_leaves_nothing(state: Path, ending: signal.Signals) -> None:
    command = [sys.executable, "-c", "from deployments.cli import main; main()", "stack", "up", "--foreground", "--state", str(state)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as starting:
        until(lambda: len(read_running(state).get("components", {})) == 3)
        mark = read_running(state)["mark"]
        starting.send_signal(ending)
        assert starting.wait(PATIENCE_S) not in {0, -ending}
        assert starting.stderr is not None
        assert "Traceback" not in starting.stderr.read()
    assert guardian.marked(mark) == []
    Lock(state, wait_s=0).release()
