"""Guards: `mlflow models serve` answers over HTTP with the soup's own labels and refuses nonsense with 400;
two versions keep their own code."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from stockpot.config import GateSpec, SoupSpec
from stockpot.ledger import registry
from stockpot.outcomes import SoupReport
from stockpot.release import releasing
from stockpot.soup.souping import cook
from tests.tiny_sweep import Ground, finish_trials, png, tiny_sweep

pytestmark = pytest.mark.slow

IMAGES = [png(seed, seed % 3) for seed in range(4)]


def released(ground: Ground, model: str, folder: Path, trials: int, spec: SoupSpec) -> SoupReport:
    sweep = tiny_sweep(ground, model, trials, spec)
    finish_trials(ground, sweep, folder)
    report = cook(sweep.id, say=[].append)
    releasing.gate(report, releasing.register(report), GateSpec())
    return report


@pytest.fixture
def served(ground: Ground, ledger: str, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The model's name and the address of its server."""
    model = f"serving-{uuid4().hex[:8]}"
    released(ground, model, tmp_path, 2, SoupSpec())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        f"models:/{model}@champion",
        "--env-manager",
        "local",
        "-p",
        str(port),
    ]
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen([*command, "-h", "127.0.0.1"], env=environ, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    try:
        for _ in range(400):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "serve.log").read_text()[-2000:]
                time.sleep(0.5)
        yield model, f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def ask(address: str, document: object) -> tuple[int, str]:
    request = urllib.request.Request(address, json.dumps(document).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_it_answers_over_http_and_refuses_nonsense(served: tuple[str, str]) -> None:
    model, address = served
    own = registry.load(f"{model}@champion").predict([{"image": data} for data in IMAGES])
    rows = [{"image": base64.b64encode(data).decode()} for data in IMAGES]
    status, text = ask(address, {"dataframe_records": rows})
    assert status == 200, text
    told = json.loads(text)["predictions"]
    assert [row["label"] for row in told] == [row["label"] for row in own]
    assert [row["probability"] for row in told] == pytest.approx([row["probability"] for row in own])
    for nonsense in (
        {"inputs": [[1, 2]]},
        {"dataframe_records": [{"image": base64.b64encode(b"no image").decode()}]},
        {"dataframe_records": [{"image": 7}]},
        {"dataframe_records": []},
    ):
        status, text = ask(address, nonsense)
        assert status == 400, (nonsense, status, text)


def test_two_versions_in_one_process_each_run_their_own_code_and_weights(ground: Ground, ledger: str, tmp_path: Path) -> None:
    model = f"serving-{uuid4().hex[:8]}"
    first = released(ground, model, tmp_path / "a", 1, SoupSpec())
    second = released(ground, model, tmp_path / "b", 3, SoupSpec(recipe="uniform"))
    loaded = [registry.load(f"{model}/{number}").unwrap_python_model() for number in (1, 2)]
    assert type(loaded[0]) is not type(loaded[1])
    assert first.soup_sha256 != second.soup_sha256
    assert not (loaded[0].model.head.weight == loaded[1].model.head.weight).all()
