"""The few questions the supervisor asks the Prefect server, in plain HTTP so that it need not import Prefect."""

import json
import urllib.request
from typing import Any

PAGE = 200


def worker_online(api: str, pool: str) -> bool:
    """Whether a worker of the pool sends heartbeats."""
    try:
        return bool(post(f"{api}/work_pools/{pool}/workers/filter", {"workers": {"status": {"any_": ["ONLINE"]}}}))
    except OSError:  # no such pool yet
        return False


def crash_interrupted_runs(api: str) -> int:
    """Say of every run that an earlier stack took down with it what became of it; returns how many.

    Processes of a local stack never outlive it, so what its database still calls running or pending has no process. Runs that
    were only scheduled are left: a worker takes them up again.
    """
    changed = 0
    for states, outcome in ((("RUNNING", "PENDING"), "CRASHED"), (("CANCELLING",), "CANCELLED")):
        query = {"flow_runs": {"state": {"type": {"any_": states}}}, "limit": PAGE}
        while runs := post(f"{api}/flow_runs/filter", query):
            for run in runs:
                state = {"type": outcome, "name": outcome.capitalize(), "message": "The local stack was stopped while this ran."}
                post(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
            changed += len(runs)
    return changed


def post(url: str, body: dict[str, Any]) -> Any:
    """The JSON answer to a JSON body."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as response:
        return json.loads(response.read())
