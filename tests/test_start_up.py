"""Promise: importing a flow or asking for help loads neither torch nor mlflow: it is what keeps a trial's start-up short."""

import os
import subprocess
import sys

import pytest

HEAVY = "('torch', 'torchvision', 'mlflow', 'open_clip', 'timm', 'transformers', 's3fs', 'webdataset', 'matplotlib')"


@pytest.mark.parametrize("module", ["flows.retrain", "flows.finetune", "flows.soup", "flows.approve", "deployments.cli"])
def test_importing_loads_nothing_heavy(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_nothing_heavy_and_names_every_command():
    code = (
        "import sys\nfrom deployments.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY} + ('prefect',) if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
    for command in (
        "demo",
        "stack",
        "data",
        "deploy",
        "request",
        "retrain",
        "soup",
        "status",
        "predict",
        "explain",
        "reproduce",
        "promote",
        "rollback",
        "prune",
    ):
        assert command in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", ["explain", "reproduce", "promote", "rollback", "prune"])
def test_a_version_of_no_server_is_refused_before_torch_is_loaded(command, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "deployments.cli", command, "photos"],
        check=False,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in {"MLFLOW_TRACKING_URI", "PREFECT_API_URL"}},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert "MLFLOW_TRACKING_URI is not set" in ended.stderr
    assert "| torch" not in ended.stderr
