"""Put the deployments, work pools and automations onto the Prefect server: `deployments/prefect.yaml`, applied from the repository root,
and every file of `deployments/automations/`."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from deployments.reading import as_request, syntax
from stockpot.errors import BadRequest, ServerUnreachable

ROOT = Path(__file__).parent.parent
"""The repository root: entry points resolve from here."""

PREFECT_FILE = "deployments/prefect.yaml"

DEPLOY_S = 600
"""How long Prefect's own command may take; some 15 s on two slow cores."""

POOLS = {"control": "process", "gpu": "process"}
"""Work pools a laptop needs. An existing pool of another type (kubernetes, docker, ecs) is left as it is."""


def deploy_all() -> list[str]:
    """Create missing pools, apply every deployment and automation, and return the deployments' names.

    Raises `BadRequest` when the file is not what it should be, or a schedule carries a request that would be refused when its hour comes.
    """
    _check_schedules()
    _make_pools()
    _make_automations()
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", PREFECT_FILE]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEPLOY_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ServerUnreachable(
            f"Prefect took no deployment of {PREFECT_FILE} in {DEPLOY_S} s; look at its server, then deploy again."
        ) from error
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines()[-5:]
        raise ServerUnreachable(f"Prefect refused the deployments of {PREFECT_FILE}: {' / '.join(line.strip() for line in lines)}")
    return [f"{flow}/stockpot" for flow in ("retrain", "finetune", "soup", "approve")]


def _check_schedules() -> None:
    """Every request written down in the file must be valid now, not at night."""
    try:
        document = yaml.safe_load((ROOT / PREFECT_FILE).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{PREFECT_FILE} cannot be read ({error}); restore it from the repository.") from error
    except yaml.YAMLError as error:
        raise BadRequest(f"{PREFECT_FILE} is not YAML: {syntax(error)}; mend it, then run `stockpot deploy` again.") from error
    if not isinstance(document, dict) or not isinstance(document.get("deployments"), list):
        raise BadRequest(f"{PREFECT_FILE} has no list `deployments`; restore it from the repository.")
    for deployment in document["deployments"]:
        for place in (deployment, *(deployment.get("schedules") or ())):
            if "request" in (parameters := place.get("parameters") or {}):
                as_request(parameters["request"], f"of a schedule of {deployment['entrypoint']} in {PREFECT_FILE}")


def _make_pools() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    with get_client(sync_client=True) as client:
        for name, kind in POOLS.items():
            try:
                client.create_work_pool(WorkPoolCreate(name=name, type=kind))
            except ObjectAlreadyExists:
                continue


def _make_automations() -> None:
    """One automation per file, found again by its name; a person's own switch (enabled or not) stays as it is."""
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import Automation, AutomationCore

    with get_client(sync_client=True) as client:
        for path in sorted((ROOT / "deployments" / "automations").glob("*.json")):
            wanted = json.loads(path.read_text())
            there: list[Automation] = client.read_automations_by_name(wanted["name"])
            for known in there:
                client.update_automation(known.id, AutomationCore.model_validate(wanted | {"enabled": known.enabled}))
            if not there:
                client.create_automation(AutomationCore.model_validate(wanted))
