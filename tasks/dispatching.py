"""Fan-out: one deployment flow run per job, one batched polling loop for all of them, retries with a delay.

Facts it rests on (Prefect 3.8.8): an idempotency key returns the existing run in whatever state, so parents that ask for "the run of this
job after that one" at once, or again, get one run; a crash is not covered by `retries=`, and an instant retry can kill the worker, so the
next attempt is scheduled in the future; waiting per child opens one websocket each, so all are read in one call.

A run that another sweep's parent started for an equal job is shared: waited for, and cancelled by nobody but its own sweep.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling

from stockpot.errors import DeviceBusy
from tasks.patience import patiently
from tasks.policies import no_deployment

PAGE = 200
"""Flow runs the API returns at once."""

PATIENCE_S = 120
"""Seconds without any run being picked up after which the missing worker is named in the log."""

_UNFINISHED = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]


@dataclass(frozen=True)
class Job:
    """One deployment flow run to be brought to an end."""

    key: str
    deployment: str
    parameters: dict[str, Any]
    name: str
    tag: str
    """The tag only this job's runs wear, such as `trial:<id>`."""
    tags: tuple[str, ...]
    """Further tags, shared with its kind."""


@dataclass(frozen=True)
class Retries:
    """When a job whose run crashed, or failed unexpectedly, is started again."""

    attempts: int
    """How many of its runs may end without having got further."""
    delay_s: float
    starts: int
    """How many runs it may have in all."""
    progress: Callable[[Job], Awaitable[int]] | None
    """How far a job's runs have come together, in whatever unit; None: no run is known to get further."""


@dataclass
class Outcome:
    """How a job stands: `state` is open, finished, failed, late or not needed, and `reason` what its run said of that."""

    job: Job
    flow_run_id: UUID | None = None
    """None before it is dispatched, and for ever where it is not needed."""
    own: bool = True
    """Whether the run wears this job's tags, and not those of another sweep."""
    attempt: int = 1
    """Runs it has had, this one included, whichever parent started them."""
    fruitless: int = 0
    """How many of them ended, while this parent looked on, without having got further than those before."""
    progress: int = 0
    """How far it had come when its run was started, or adopted."""
    state: str = "open"
    reason: str = ""
    picked_up: bool = False

    def follow(self, run: FlowRun) -> None:
        """Let this be the job's run from now on."""
        self.flow_run_id, self.attempt = run.id, int(run.parameters.get("attempt", 1))
        self.own = set(self.job.tags) <= set(run.tags)


async def run_to_end(
    jobs: Iterable[Job],
    *,
    attempts: int,
    retry_delay_s: float,
    starts: int = 100,
    progress: Callable[[Job], Awaitable[int]] | None = None,
    deadline_s: float | None = None,
    on_change: Callable[[list[Outcome]], Awaitable[None]] | None = None,
    enough: Callable[[list[Outcome]], Awaitable[str | None]] | None = None,
) -> list[Outcome]:
    """Dispatch every job from the current flow run and wait until each has finished, failed for good, or the deadline has passed.

    A crashed or unexpectedly failed run is started again after `retry_delay_s`, until `attempts` runs have ended without getting further
    (by `progress`, see `Retries`) or it was started `starts` times, by whichever parent; a stated failure (a failed state with a name of
    its own) and a run cancelled here or by hand are final. At the deadline what still runs is cancelled and counted as late. `on_change`
    is awaited with all outcomes once they are dispatched and whenever one of them changed; `enough` before anything is dispatched and then
    likewise: when it gives a reason, jobs that no worker has taken are not needed, and those that one has are seen through.
    """
    started = time.monotonic()
    told = False
    retries = Retries(attempts, retry_delay_s, starts, progress)
    async with get_client() as client:
        jobs = tuple(jobs)
        left = await patiently(lambda: _left_behind(client, jobs))
        outcomes = list(await asyncio.gather(*(_adopted(job, left.get(job.tag), retries) for job in jobs)))
        await _spare(client, outcomes, enough)
        for one in outcomes:
            if one.state == "open" and one.flow_run_id is None:
                one.follow(await _submit(one.job, left.get(one.job.tag), retries.delay_s))
        if on_change:
            await on_change(outcomes)
        while waiting := [one for one in outcomes if one.state == "open"]:
            waited_s = time.monotonic() - started
            if deadline_s is not None and waited_s > deadline_s:
                await _give_up(client, waiting, f"not finished within the deadline of {deadline_s:g} s")
            elif not await _step(client, outcomes, retries):
                told = told or _nobody_came(outcomes, waited_s)
                await asyncio.sleep(min(10.0, 1.0 + len(waiting) / 50))
                continue
            await _spare(client, outcomes, enough)
            if on_change:
                await on_change(outcomes)
    return outcomes


async def cancel_runs(client: PrefectClient, run_ids: Iterable[UUID]) -> int:
    """Ask Prefect to cancel these runs; their workers end the processes. Returns how many were asked."""
    ids = list(run_ids)
    for run_id in ids:
        await patiently(partial(client.set_flow_run_state, run_id, Cancelling(message="Cancelled with its sweep.")))
    return len(ids)


async def unfinished_runs(client: PrefectClient, *tags: str) -> list[FlowRun]:
    """Every flow run with one of these tags that has not ended."""
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED))
    return await patiently(lambda: _pages(client, FlowRunFilter(tags=FlowRunFilterTags(any_=list(tags)), state=state)))


async def _pages(client: PrefectClient, query: FlowRunFilter) -> list[FlowRun]:
    runs: list[FlowRun] = []
    while page := await client.read_flow_runs(flow_run_filter=query, sort=FlowRunSort.ID_DESC, limit=PAGE, offset=len(runs)):
        runs += page
    return runs


async def _left_behind(client: PrefectClient, jobs: tuple[Job, ...]) -> dict[str, FlowRun]:
    """The latest run of each of these jobs, whichever parent started it, by tag. One that still goes on is waited for, not doubled."""
    wanted = {job.tag for job in jobs}
    runs = await _pages(client, FlowRunFilter(tags=FlowRunFilterTags(any_=list(wanted)))) if wanted else []
    in_order = sorted(runs, key=lambda run: (run.state_type in _UNFINISHED, run.created or datetime.min.replace(tzinfo=UTC)))
    return {tag: run for run in in_order for tag in wanted & set(run.tags)}


async def _adopted(job: Job, run: FlowRun | None, retries: Retries) -> Outcome:
    """How a job stands whose latest run this is: what earlier runs came to is no merit of the next one."""
    one = Outcome(job)
    if run is None:
        return one
    one.progress = await _progress(job, retries)
    if run.state_type in _UNFINISHED and run.state_type != StateType.CANCELLING:
        one.follow(run)
        one.picked_up = run.state_type != StateType.SCHEDULED
    return one


async def _spare(client: PrefectClient, outcomes: list[Outcome], enough: Callable[[list[Outcome]], Awaitable[str | None]] | None) -> None:
    """Withdraw what no worker has taken, once there is enough. Workers go on while that is found out, so the runs are read again."""
    idle = [one for one in outcomes if one.state == "open" and not one.picked_up]
    reason = await enough(outcomes) if enough and idle else None
    if reason is None:
        return
    runs = await _read(client, [one.flow_run_id for one in idle if one.flow_run_id])
    taken = {run.id for run in runs if run.state_type != StateType.SCHEDULED}
    spared = [one for one in idle if one.flow_run_id not in taken]
    for one in spared:
        if one.flow_run_id and one.own:  # nothing of it runs, so nothing has to end first
            await patiently(partial(client.set_flow_run_state, one.flow_run_id, Cancelled(message=reason)))
        one.state, one.reason = "not needed", reason


async def _submit(job: Job, after: FlowRun | None, delay_s: float) -> FlowRun:
    """The run of this job that follows `after`, `delay_s` after its end: made now, unless it is there, because another parent of the same
    job asked for it too."""
    now = datetime.now(UTC)
    when = max(now, (after.end_time or now) + timedelta(seconds=delay_s)) if after else now
    attempt = int(after.parameters.get("attempt", 1)) + 1 if after else 1
    try:
        return await patiently(
            lambda: arun_deployment(
                job.deployment,
                parameters={**job.parameters, "attempt": attempt},
                scheduled_time=when,
                flow_run_name=job.name if attempt == 1 else f"{job.name}-attempt-{attempt}",
                tags=[job.tag, *job.tags],
                idempotency_key=f"{job.tag}:{after.id if after else 'first'}",
                timeout=0,
            )
        )
    except ObjectNotFound as error:
        raise no_deployment(job.deployment) from error


async def _step(client: PrefectClient, outcomes: list[Outcome], retries: Retries) -> bool:
    waiting = {one.flow_run_id: one for one in outcomes if one.state == "open" and one.flow_run_id}
    changed = False
    runs = await _read(client, list(waiting))
    for deleted in set(waiting) - {run.id for run in runs}:
        changed = True
        waiting[deleted].state, waiting[deleted].reason = "failed", "its flow run was deleted from Prefect"
    for run in runs:
        one = waiting[run.id]
        one.picked_up |= run.state_type != StateType.SCHEDULED
        if run.state is None or not run.state.is_final():
            continue
        changed = True
        if run.state.is_completed():
            one.state, one.reason = "finished", run.state.message or ""
            continue
        one.reason = run.state.message or run.state.name or "no reason given"
        excused = _excused(one, run.state)
        if not excused and (run.state.is_cancelled() or (run.state.is_failed() and run.state.name != "Failed")):
            one.state = "failed"
        else:
            await _start_again(one, run, retries, excused)
    return changed


def _excused(one: Outcome, state: State[Any]) -> bool:
    """Whether a run ended by nothing that it did: all GPUs of its node were held, or the other sweep, whose run it was, cancelled it."""
    return state.name == DeviceBusy.__name__ or (state.is_cancelled() and not one.own)


async def _progress(job: Job, retries: Retries) -> int:
    return await retries.progress(job) if retries.progress else 0


async def _start_again(one: Outcome, ended: FlowRun, retries: Retries, excused: bool) -> None:
    """The job's next run, or its end: a run that got further, as one that was preempted or had its time did, is held against nobody."""
    before, one.progress = one.progress, max(one.progress, await _progress(one.job, retries))
    one.fruitless += one.progress <= before and not excused
    if one.fruitless >= retries.attempts or one.attempt >= retries.starts:
        counted = f"attempt {one.fruitless} of {retries.attempts}" if one.fruitless >= retries.attempts else f"started {one.attempt} times"
        one.state, one.reason = "failed", f"{one.reason} ({counted})"
        return
    get_run_logger().warning(
        "%s: %s Attempt %d starts in %g s; %d of %d ended without getting further.",
        *(one.job.name, one.reason, one.attempt + 1, retries.delay_s, one.fruitless, retries.attempts),
    )
    one.follow(await _submit(one.job, ended, retries.delay_s))


async def _read(client: PrefectClient, ids: list[UUID]) -> list[FlowRun]:
    """All runs, in pages of 200."""
    runs: list[FlowRun] = []
    for start in range(0, len(ids), PAGE):
        query = FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + PAGE]))
        runs += await patiently(partial(client.read_flow_runs, flow_run_filter=query, sort=FlowRunSort.ID_DESC, limit=PAGE))
    return runs


async def _give_up(client: PrefectClient, waiting: list[Outcome], reason: str) -> None:
    """A run of another sweep goes on for it."""
    await cancel_runs(client, [one.flow_run_id for one in waiting if one.flow_run_id and one.own])
    for one in waiting:
        one.state, one.reason = "late", reason


def _nobody_came(outcomes: list[Outcome], waited_s: float) -> bool:
    """Say in the log, once, that no worker took any of the runs; True when said."""
    if waited_s < PATIENCE_S or any(one.picked_up for one in outcomes):
        return False
    get_run_logger().warning("No run of %s was picked up in %d s: is a worker of its pool up?", outcomes[0].job.deployment, PATIENCE_S)
    return True
