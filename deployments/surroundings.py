"""Where the servers are, and whether they answer: asked before anything is started, so that a wrong address costs a sentence and no GPU."""

import os
from pathlib import Path

import httpx

from stockpot.config import RetrainRequest
from stockpot.errors import ServerUnreachable


def use_local_stack(state: Path) -> None:
    """When neither Prefect nor MLflow is configured and a local stack of this folder is up, use it."""
    from deployments.stack import running_environ

    if "PREFECT_API_URL" not in os.environ and "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ.update(running_environ(state))


def check_prefect(timeout_s: float = 4.0) -> None:
    """Raises `ServerUnreachable` unless a Prefect server answers at `PREFECT_API_URL`."""
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise ServerUnreachable(
            "PREFECT_API_URL is not set; set it to a Prefect server, or start the local stack with `stockpot stack up`."
        )
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    try:
        answer = httpx.get(f"{url}/admin/version", timeout=timeout_s, auth=httpx.BasicAuth(user, password) if user else None)
    except httpx.HTTPError as error:
        raise ServerUnreachable(
            f"No Prefect server answers at PREFECT_API_URL={url} ({type(error).__name__}); start one, or the local stack: "
            "`stockpot stack up`."
        ) from error
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise ServerUnreachable(f"Prefect at {url} refused access (HTTP 401); set PREFECT_API_AUTH_STRING to its user:password.")
    if not answer.is_success:
        raise ServerUnreachable(
            f"What answers at PREFECT_API_URL={url} is no Prefect API (HTTP {answer.status_code}); it should end in `/api`."
        )


def check_request(request: RetrainRequest) -> None:
    """Raises a stated failure when MLflow, the object store, a snapshot, the architecture or as many trials are not there."""
    from stockpot import storage
    from stockpot.data.snapshots import pin
    from stockpot.ledger import connection
    from stockpot.models.naming import is_uri
    from stockpot.sweeps import allotted

    allotted(request)
    connection.check_server()
    storage.check(request.store, missing=None)  # it is empty before the first sweep
    for uri in (request.data.snapshot, request.data.test, *request.data.shifts.values()):
        if uri:
            pin(uri)
    if not is_uri(request.base.arch):  # a name, known to libraries that take seconds to load
        from stockpot.models.bases import require_known

        require_known(request.base)
