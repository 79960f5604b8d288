"""The door to the MLflow server: one client, one place for timeouts, one translation of a dead server into a sentence, and runs by
what they are (`stockpot.kind`, `stockpot.sweep`) instead of by id. `tracking` and `registry` are built on it.

MLflow's own defaults would block a worker for four minutes when the server is gone.
"""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.entities import Experiment, LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException, RestException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking._tracking_service.utils import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from stockpot.errors import BadRequest, RegistryError, ServerRefused, ServerUnreachable, StockpotError, SweepMissing

PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""MLflow's client settings, where the environment does not say otherwise: 14 s of retries; 60 s for a server that stores a large file."""


REFUSALS = (401, 403)
"""HTTP's ways to say that this user may not."""

NOT_ARRIVED = re.compile(r"failures occurred while downloading.*?##### File (?P<path>.+?) #####\s*(?P<reason>[^\n]*)", re.DOTALL)
"""How MLflow says that a download failed (3.17.2): with the reasons in its text, and nowhere else."""


def address() -> str:
    """`MLFLOW_TRACKING_URI`. Raises `ServerUnreachable` when it is not set."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise ServerUnreachable(
            "MLFLOW_TRACKING_URI is not set, so there is no ledger; set it to the address of an MLflow server, "
            "or start the local one with `stockpot stack up`."
        )
    return uri


def client() -> MlflowClient:
    """A client of the server at `MLFLOW_TRACKING_URI`, with `PATIENCE`. MLflow's own address follows: reading `models:/...` asks that one,
    whichever is given (3.17.2)."""
    uri = address()
    if mlflow.get_tracking_uri() != uri:
        mlflow.set_tracking_uri(uri)
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def check_server(timeout_s: float = 4.0) -> None:
    """Raises `ServerUnreachable` within some `timeout_s` unless the server at `MLFLOW_TRACKING_URI` says it is healthy, `ServerRefused`
    unless it lets this user in."""
    uri = address()
    if not uri.startswith(("http://", "https://")):
        return
    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=timeout_s).raise_for_status()
    except requests.RequestException as error:
        raise ServerUnreachable(f"{_silent(uri)} ({error})") from error
    with asking():
        answer = http_request(
            get_default_host_creds(uri), "/api/2.0/mlflow/experiments/search?max_results=1", "GET", timeout=timeout_s, max_retries=0
        )
    if answer.status_code in REFUSALS:
        raise _refused(answer.status_code)


@contextmanager
def asking() -> Iterator[None]:
    """A server that does not answer, or fails while it does, becomes `ServerUnreachable`; one that does not let this user in
    `ServerRefused`; a file that is not there (any more) `RegistryError`; what it refuses for another reason stays an `MlflowException`."""
    try:
        yield
    except RestException as error:
        if (status := error.get_http_status_code()) in REFUSALS:
            raise _refused(status) from error
        if status < 500:
            raise
        raise ServerUnreachable(f"{_silent(address())} ({str(error).splitlines()[0][:200]})") from error
    except (MlflowException, requests.RequestException) as error:
        told, lost = str(error), NOT_ARRIVED.search(str(error))
        if isinstance(error, MlflowException) and "API request to" not in told and not lost:
            raise
        if refused := next((one for one in REFUSALS if f"failed with error code {one} " in told or f"{one} Client Error" in told), None):
            raise _refused(refused) from error
        if lost:
            raise _not_arrived(lost["path"], lost["reason"][:200], gone=isinstance(error, MlflowException) and is_gone(error)) from error
        raise ServerUnreachable(f"{_silent(address())} ({told.splitlines()[0][:200]})") from error


def is_gone(error: MlflowException) -> bool:
    """Whether a record or a file is not in the ledger (any more), be it of the server's own disk or of an object store behind it."""
    return error.error_code == "RESOURCE_DOES_NOT_EXIST" or any(
        sign in str(error) for sign in ("404 Client Error", "An error occurred (404)")
    )


def experiment(model: str) -> str:
    """The id of the experiment named after the model, created when there is none."""
    if found := client().get_experiment_by_name(model):
        return str(found.experiment_id)
    try:
        return str(client().create_experiment(model))
    except RestException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return experiment(model)


def create_run(model: str, name: str, tags: dict[str, str]) -> Run:
    """A new run in the model's experiment."""
    return client().create_run(experiment(model), tags=tags, run_name=name)


def create_child(model: str, name: str, kind: str, sweep_id: str, tags: dict[str, str]) -> Run:
    """A new run under the sweep's, whichever process created that one."""
    parent = str(sweep_run(sweep_id).info.run_id)
    return create_run(model, name, {"stockpot.kind": kind, "stockpot.sweep": sweep_id, "mlflow.parentRunId": parent, **tags})


def of_kind(kind: str, sweep_id: str) -> str:
    """The filter for a sweep's runs of one kind: sweep, trial or soup."""
    return f"tags.`stockpot.kind` = '{kind}' and tags.`stockpot.sweep` = {quoted(sweep_id)}"


def quoted(text: str) -> str:
    """A string as MLflow's filters take it. They have no escapes: raises `BadRequest` for what no filter can hold."""
    if "'" in text and '"' in text:
        raise BadRequest(f"There is nothing called {text}: names hold one kind of quotation mark at the most. Correct the name.")
    return f'"{text}"' if "'" in text else f"'{text}'"


def find_run(model: str, kind: str, sweep_id: str, more: str = "") -> Run | None:
    """The oldest run of that kind, `more` narrowing the filter; None when there is none."""
    return next(iter(search_runs([experiment(model)], of_kind(kind, sweep_id) + more, "attributes.start_time")), None)


def sweep_run(sweep_id: str) -> Run:
    """The parent run of a sweep, in whichever experiment. Raises `SweepMissing`."""
    experiments = [one.experiment_id for one in search_experiments()]
    for run in search_runs(experiments, of_kind("sweep", sweep_id), "attributes.start_time"):
        return run
    raise SweepMissing(f"The ledger at {address()} has no sweep {sweep_id!r}; `stockpot status` lists the sweeps it has.")


def search_runs(experiments: list[str], condition: str, order: str) -> list[Run]:
    """Every run that meets the condition, over all pages."""
    return _all_pages(lambda token: client().search_runs(experiments, condition, order_by=[order], page_token=token))


def search_experiments() -> list[Experiment]:
    """Every experiment, over all pages."""
    return _all_pages(lambda token: client().search_experiments(page_token=token))


def search_versions(condition: str) -> list[ModelVersion]:
    """Registered versions, of every model unless the condition names one, over all pages."""
    return _all_pages(lambda token: client().search_model_versions(condition, page_token=token))


def search_models(model: str, condition: str) -> list[LoggedModel]:
    """LoggedModels of an experiment, oldest first, over all pages."""
    home, oldest_first = client().get_experiment_by_name(model), [{"field_name": "creation_timestamp", "ascending": True}]
    if home is None:
        return []
    place = [home.experiment_id]
    return _all_pages(lambda token: client().search_logged_models(place, condition or None, order_by=oldest_first, page_token=token))


def read_file(mlflow_run_id: str, name: str) -> bytes:
    """One artifact of a run."""
    with tempfile.TemporaryDirectory() as folder:
        return fetch_file(mlflow_run_id, name, Path(folder)).read_bytes()


def fetch_file(mlflow_run_id: str, name: str, folder: Path) -> Path:
    """Download one artifact of a run. From where the run keeps them: asked for `runs:/...`, MLflow hides whatever went wrong (3.17.2)."""
    home = client().get_run(mlflow_run_id).info.artifact_uri
    return Path(get_artifact_repository(home, tracking_uri=address()).download_artifacts(name, str(folder)))


def _all_pages(ask: Callable[[str | None], Any]) -> list[Any]:
    """What a search of MLflow finds, which gives so much at once and no more. ask: for the page at a token, the first one at None."""
    found: list[Any] = []
    token: str | None = None
    while True:
        page = ask(token)
        found.extend(page)
        if not (token := page.token):
            return found


def _silent(uri: str) -> str:
    return f"No MLflow server answers at MLFLOW_TRACKING_URI={uri}; start it (`stockpot stack up` for the local one) or correct the address"


def _not_arrived(path: str, reason: str, *, gone: bool) -> StockpotError:
    if gone:
        return RegistryError(
            f"The ledger at {address()} has no `{path}` any more: it was deleted; restore it, or make it again with `stockpot soup SWEEP`."
        )
    return ServerUnreachable(
        f"The download of `{path}` from MLFLOW_TRACKING_URI={address()} broke off ({reason}); run the same again when the server answers."
    )


def _refused(status: int) -> ServerRefused:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    return ServerRefused(
        f"MLflow at {address()} refused access (HTTP {status}, {f'user {user}' if user else 'no user name given'}); set "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to someone who may use it."
    )
