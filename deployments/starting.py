"""Start a deployment and watch it to the end: a live display on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from stockpot.errors import StockpotError

POLL_S = 1.0


@dataclass(frozen=True)
class Started:
    """A flow run that was just created."""

    id: UUID
    name: str
    page: str | None
    """For a browser; None where no server with pages is known."""

    @property
    def where(self) -> str:
        """Where a person finds it."""
        return self.page or f"flow run {self.id}"


def start(deployment: str, parameters: dict[str, Any], *, name: str, tags: list[str]) -> Started:
    """Create a flow run of a deployment. Raises `BadRequest` when the server has no such deployment."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    from tasks.policies import flow_run_page, no_deployment

    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(deployment)
        except ObjectNotFound as error:
            raise no_deployment(deployment) from error
        run = client.create_flow_run_from_deployment(found.id, name=name, parameters=parameters, tags=tags)
    return Started(run.id, run.name, flow_run_page(run.id))


def watch_to_end(started: Started, meanwhile: Callable[[], None] = lambda: None) -> str:
    """Show progress until the run ends; returns its sweep's id. Raises `StockpotError` with the run's own sentence when it fails.

    Leaving early (Ctrl-C) stops only the watching. `meanwhile` is called between two looks; what it raises ends the watching.
    """
    with _display() as show:
        for run, children in _states(started.id):
            show(run, children)
            meanwhile()
    if not run.state.is_completed():
        raise StockpotError(f"{run.name} ended {run.state.name}: {run.state.message or 'no reason given'} See {started.where}")
    sweep: str = next(tag.removeprefix("sweep:") for tag in run.tags if tag.startswith("sweep:"))
    return sweep


def _states(run_id: UUID) -> Iterator[tuple[Any, list[Any]]]:
    """The run and its children, read again every second until the run has ended. Raises `ServerUnreachable` where the server stays away;
    the run itself may go on."""
    from prefect.client.orchestration import get_client

    from tasks.patience import NO_ANSWER, Absence

    absence = Absence()
    with get_client(sync_client=True) as client:
        while True:
            try:
                run, children = client.read_flow_run(run_id), _children(client, run_id)
            except NO_ANSWER as error:
                absence.bear(error)
            else:
                absence.end()
                yield run, children
                if run.state is not None and run.state.is_final():
                    return
            time.sleep(POLL_S)


def _children(client: Any, run_id: UUID) -> list[Any]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
    from prefect.client.schemas.sorting import FlowRunSort

    from tasks.dispatching import PAGE

    query = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run_id]))
    runs: list[Any] = []
    while page := client.read_flow_runs(flow_run_filter=query, sort=FlowRunSort.ID_DESC, limit=PAGE, offset=len(runs)):
        runs += page
        if len(page) < PAGE:
            break
    return runs


@contextmanager
def _display() -> Iterator[Any]:
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with _live(console) as show:
            yield show
    else:
        yield _plain()


@contextmanager
def _live(console: Any) -> Iterator[Any]:
    """A bar over the children that have ended, and what runs now."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=None, now="")

        def show(run: Any, children: list[Any]) -> None:
            now = ", ".join(sorted(child.name for child in children if child.state.is_running()))
            ended = sum(child.state.is_final() for child in children)
            progress.update(bar, description=f"{run.name} {run.state.name.lower()}", total=len(children) or None, completed=ended, now=now)

        yield show


def _plain() -> Any:
    """One line per change of state, with its time; where a trial ended, with how many of those started have finished. What a child said at
    its end its parent does not say again; why the run failed is what `watch_to_end` raises."""
    seen: dict[UUID, str] = {}
    told: list[str] = []

    def show(run: Any, children: list[Any]) -> None:
        trials = [child for child in children if child.name.startswith("trial-")]
        finished = len({child.name for child in trials if child.state.is_completed()})
        count = f", {finished} of {len({child.name for child in trials})} trials finished"
        for one in (*sorted(children, key=lambda child: child.name), run):
            if one.state is None or seen.get(one.id) == one.state.name:
                continue
            seen[one.id] = one.state.name
            ended = one.state.is_final()
            said = (one.state.message or "") if ended else ""
            if one is run:
                said = _less(said, told) if one.state.is_completed() else ""
            told.append(said)
            behind = (count if ended and one in trials else "") + (f" ({said})" if said else "")
            print(f"{time.strftime('%H:%M:%S')} {one.name}: {one.state.name}{behind}", flush=True)

    return show


def _less(message: str, told: list[str]) -> str:
    """A message without what was told already, where it ends in that."""
    for one in told:
        message = message.removesuffix(one).strip()
    return message
