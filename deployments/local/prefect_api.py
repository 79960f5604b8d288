"""The few things the supervisor asks of the Prefect server, in plain HTTP so that it need not import Prefect."""

import json
import time
import urllib.error
import urllib.request
from typing import Any

from stockpot.errors import StackError

PAGE = 200
ATTEMPTS = 20
BUSY = 503


def make_pool(api: str, pool: str, template: dict[str, Any]) -> None:
    """A process pool, if there is none of that name. Made here because two workers that each make theirs get in each other's way."""
    if not post(f"{api}/work_pools/filter", {"work_pools": {"name": {"any_": [pool]}}}):
        post(f"{api}/work_pools/", {"name": pool, "type": "process", "base_job_template": template})


def worker_online(api: str, pool: str) -> bool:
    """Whether a worker of the pool sends heartbeats; False too while the server does not say."""
    try:
        return bool(post(f"{api}/work_pools/{pool}/workers/filter", {"workers": {"status": {"any_": ["ONLINE"]}}}))
    except StackError:
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
    """The JSON answer to a JSON body. Asks again, as Prefect's own client does, when the server says it is busy (SQLite has one writer).

    Raises `StackError` when it refuses or does not answer.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(ATTEMPTS):
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with opener.open(request, timeout=30) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            if error.code != BUSY:
                raise StackError(f"{url} answered HTTP {error.code}: {error.read(300).decode(errors='replace')}") from error
        except OSError as error:
            raise StackError(f"{url} does not answer ({error}); see its log.") from error
        time.sleep(0.5)
    raise StackError(f"{url} was still busy after {ATTEMPTS} attempts; see its log.")
