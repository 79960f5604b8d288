"""Promise: importing a flow or asking for help loads neither torch nor mlflow: it is what keeps a trial's start-up short."""

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
