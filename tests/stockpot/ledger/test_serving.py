"""Guards: `mlflow models serve` answers over HTTP with the soup's own labels and refuses nonsense with 400; the exported flavour loads
without pickle; two versions keep their own code."""

import base64
import io
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from PIL import Image

from deployments.demo.serving import Service, serving
from deployments.local.processes import answers
from stockpot.config import GateSpec, ReleaseSpec, SoupSpec
from stockpot.data.images import decode, eval_transform
from stockpot.ledger import packaging, registry, served_model, tracking
from stockpot.outcomes import SoupReport
from stockpot.release import releasing
from stockpot.soup.souping import cook
from tests.tiny_sweep import CLASSES, PREPROCESS, Ground, finish_trials, png, tiny_sweep
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.slow

IMAGES = [png(seed, seed % 3) for seed in range(4)]


def released(ground: Ground, model: str, folder: Path, trials: int, spec: SoupSpec, release: ReleaseSpec | None = None) -> SoupReport:
    sweep = tiny_sweep(ground, model, trials, spec)
    tracking.open_sweep(sweep.model_copy(update={"request": sweep.request.model_copy(update={"release": release or ReleaseSpec()})}))
    finish_trials(ground, sweep, folder)
    report = cook(sweep.id, say=[].append)
    releasing.gate(report, releasing.register(report), GateSpec())
    return report


@pytest.fixture
def served(ground: Ground, ledger: str, tmp_path: Path) -> Iterator[tuple[str, Service]]:
    """The model's name and its server."""
    model = f"serving-{uuid4().hex[:8]}"
    released(ground, model, tmp_path, 2, SoupSpec())
    with serving(f"models:/{model}@champion", tmp_path / "serve.log") as service:
        service.wait()
        yield model, service
    assert service.process.returncode is not None
    assert not answers(f"{service.address}/ping"), "it is gone, and what it started"


def ask(address: str, document: object) -> tuple[int, str]:
    request = urllib.request.Request(address, json.dumps(document).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_it_answers_over_http_and_refuses_nonsense(served: tuple[str, Service]) -> None:
    model, service = served
    address = f"{service.address}/invocations"
    own = registry.load(f"{model}@champion").predict([{"image": data} for data in IMAGES])
    rows = [{"image": base64.b64encode(data).decode()} for data in IMAGES]
    status, text = ask(address, {"dataframe_records": rows})
    assert status == 200, text
    told = json.loads(text)["predictions"]
    assert [row["label"] for row in told] == [row["label"] for row in own]
    assert [row["probability"] for row in told] == pytest.approx([row["probability"] for row in own])
    assert service.ask(IMAGES[0]) == told[0]
    status, text = ask(address, {"dataframe_records": rows[:1], "params": {"top_k": 2}})
    assert status == 200, text
    (one,) = json.loads(text)["predictions"]
    assert [row["label"] for row in one["top"]] == [row["label"] for row in registry.load(f"{model}@champion").predict(
        [{"image": IMAGES[0]}], params={"top_k": 2})[0]["top"]]  # fmt: skip
    assert len(one["top"]) == 2
    for nonsense in (
        {"dataframe_records": rows[:1], "params": {"top_k": 0}},
        {"dataframe_records": rows[:1], "params": {"top_k": "many"}},
        {"dataframe_records": [{"image": "A" * (served_model.MAX_BYTES * 4 // 3 + 8)}]},
        {"dataframe_records": [{"picture": rows[0]["image"]}]},
        {"inputs": [[1, 2]]},
        {"dataframe_records": [{"image": base64.b64encode(b"no image").decode()}]},
        {"dataframe_records": [{"image": 7}]},
        {"dataframe_records": []},
    ):
        status, text = ask(address, nonsense)
        assert status == 400, (nonsense, status, text)
        assert "Traceback" not in text, "the sentence, and nothing of the server"


def test_two_versions_in_one_process_each_run_their_own_code_and_weights(
    ground: Ground, ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"serving-{uuid4().hex[:8]}"
    first = released(ground, model, tmp_path / "a", 1, SoupSpec())
    other = tmp_path / "served_model.py"
    other.write_text(packaging.SERVED_FILE.read_text().replace("MAX_PIXELS = 64 * 10**6", "MAX_PIXELS = 400"))
    monkeypatch.setattr(packaging, "SERVED_FILE", other)
    second = released(ground, model, tmp_path / "b", 3, SoupSpec(recipe="uniform"))
    assert first.soup_sha256 != second.soup_sha256
    one, two = (registry.load(f"{model}/{number}") for number in (1, 2))
    wide, small = encoded(30, 20), encoded(20, 20)
    for _ in range(2):  # loading and asking the second changed nothing about the first
        assert one.predict([{"image": wide}])[0]["probability"] > 0
        assert one.predict([{"image": small}]) != two.predict([{"image": small}])
        with pytest.raises(ValueError, match="at most 400"):
            two.predict([{"image": wide}])


def encoded(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 60)).save(file, "png")
    return file.getvalue()


PLAIN = """
import sys
for name in ("stockpot", "tasks", "flows", "deployments", "open_clip"):
    sys.modules[name] = None
import mlflow.pytorch, torch
model = mlflow.pytorch.load_model(sys.argv[1])
pixels = torch.load(sys.argv[2], weights_only=True)
torch.save(model(pixels).detach(), sys.argv[3])
"""


def test_a_plain_pytorch_consumer_loads_the_exported_flavour_without_pickle(ground: Ground, ledger: str, tmp_path: Path) -> None:
    model = f"serving-{uuid4().hex[:8]}"
    released(ground, model, tmp_path / "a", 2, SoupSpec(), ReleaseSpec(torch_export=True))
    images = torch.stack([eval_transform(decode(data), PREPROCESS) for data in IMAGES])
    torch.save(images / 255, tmp_path / "pixels.pt")
    environ = {"MLFLOW_TRACKING_URI": ledger, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", PLAIN, f"models:/{model}@champion", str(tmp_path / "pixels.pt"), str(tmp_path / "logits.pt")]
    subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=True)
    own = registry.load(f"{model}@champion").predict([{"image": data} for data in IMAGES])
    probabilities, places = torch.load(tmp_path / "logits.pt").softmax(1).max(1)
    assert [CLASSES[place] for place in places.tolist()] == [row["label"] for row in own]
    assert probabilities.tolist() == pytest.approx([row["probability"] for row in own], abs=1e-5)
