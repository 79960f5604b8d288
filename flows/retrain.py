"""The table of contents: pin the data, prepare the init, draw the trials, fan them out, soup what finished.

The sweep's id travels in the tags of every run, so the Prefect page can show one sweep, and a cancelled parent finds its children.
"""

import math
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.states import Completed

from stockpot.config import RetrainRequest, Sweep, Trial
from stockpot.errors import SoupFailed, StockpotError, TooFewIngredients
from tasks.dispatching import Job, cancel_runs, run_to_end, unfinished_runs
from tasks.finetuning import trial_progress
from tasks.patience import patiently
from tasks.planning import close_sweep, end_cancelled_sweep, finished_trials, open_sweep, pin_data, prepare_init
from tasks.policies import stated_failure
from tasks.showing import show_sweep, sweep_progress
from tasks.sparing import stop_rule


async def cancel_children(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001  (Prefect's signature)
    """Hook: a cancelled retraining takes its trials and its soup along. A crashed one does not: a retry picks them up again."""
    async with get_client() as client:
        parent = await patiently(lambda: client.read_flow_run(flow_run.id))
        for tag in (tag for tag in parent.tags if tag.startswith("sweep:")):
            runs = [run for run in await unfinished_runs(client, tag) if run.id != parent.id]
            if any(run.flow_id == parent.flow_id for run in runs):
                continue  # another retraining of the same sweep goes on with them
            await cancel_runs(client, [run.id for run in runs])
            end_cancelled_sweep(tag.removeprefix("sweep:"))


@flow(name="retrain", flow_run_name="retrain-{request.model}", description=__doc__, on_cancellation=[cancel_children])
async def retrain(request: RetrainRequest) -> State[Any]:
    """One retraining; the final state carries the sweep's id and says what the gate said. Run again with the same request it repeats no
    finished trial and registers nothing twice."""
    try:
        data = pin_data(request)
        init = await prepare_init(request, data)
        sweep = open_sweep(request, data, init)
        await _wear_tags(sweep)
        told = await run_trials(sweep)
        verdict = await run_soup(sweep)
    except StockpotError as error:
        return stated_failure(error)
    return Completed(message=f"{told} {verdict}", data=sweep.id)


async def run_trials(sweep: Sweep) -> str:
    """Every unfinished trial as its own flow run, as long as more are needed; returns how many were finished before or not needed. Raises
    `TooFewIngredients` under the quorum, naming each failed trial and its reason."""
    fan_out, total = sweep.request.fan_out, len(sweep.trials)
    before = finished_trials(sweep)
    get_run_logger().info("Sweep %s: %d trials, %d finished before.", sweep.id, total, len(before))
    async with stop_rule(sweep, len(before)) as enough:
        outcomes = await run_to_end(
            [_job(sweep, trial) for trial in sweep.trials if trial.id not in before],
            attempts=fan_out.attempts,
            starts=fan_out.starts,
            progress=trial_progress,
            retry_delay_s=fan_out.retry_delay_s,
            deadline_s=fan_out.deadline_s,
            on_change=sweep_progress(sweep, len(before)),
            enough=enough,
        )
    finished = finished_trials(sweep)
    left = [one for one in outcomes if one.job.key not in finished]
    spared = {one.job.key: one.reason for one in left if one.state == "not needed"}
    failed = {one.job.key: one.reason or "ended without an ingredient" for one in left if one.state != "not needed"}
    try:
        require_quorum(sweep, len(finished), failed, len(spared))
    finally:
        await show_sweep(sweep, finished, failed, spared)
    return f"{len(before)} of {total} trials were finished before{f', {len(spared)} were not needed' if spared else ''}."


def require_quorum(sweep: Sweep, finished: int, failed: dict[str, str], spared: int) -> None:
    """Close the sweep in the ledger. Raises `TooFewIngredients`, naming what failed, under the quorum of the trials that were needed."""
    total = len(sweep.trials)
    needed = max(1, math.ceil(sweep.request.fan_out.quorum * (total - spared) - 1e-9))  # 0.28 of 25 is 7, whatever binary fractions say
    counts = {"trials": total, "finished": finished, "failed": len(failed), "not_needed": spared}
    close_sweep(sweep, "FINISHED" if finished >= needed else "FAILED", counts)
    if finished < needed:
        reasons = "; ".join(f"{', '.join(trials)}: {reason.rstrip('.')}" for reason, trials in _by_reason(failed).items())
        raise TooFewIngredients(
            f"{finished} of {total} trials of sweep {sweep.id} finished, {needed} are needed ({reasons}). "
            "Mend the cause and run the same request again: finished trials are kept."
        )
    for trial, reason in failed.items():
        get_run_logger().warning("Trial %s is left out: %s", trial, reason)


def _job(sweep: Sweep, trial: Trial) -> Job:
    return Job(
        trial.id,
        sweep.request.fan_out.deployment,
        {"trial": trial.model_dump(mode="json")},
        f"trial-{trial.index}-{trial.id}",
        f"trial:{trial.model}:{trial.id}",
        _tags(sweep),
    )


def _by_reason(failed: dict[str, str]) -> dict[str, list[str]]:
    """Trials by why they failed: a mistake in the request fails many in the same words."""
    return {reason: [trial for trial, own in failed.items() if own == reason] for reason in failed.values()}


async def run_soup(sweep: Sweep) -> str:
    """Trigger the soup flow and see it through; returns what it said of the version."""
    job = Job(f"{sweep.id}:soup", SOUP, {"sweep_id": sweep.id}, f"soup-{sweep.id}", f"soup:{sweep.id}", _tags(sweep))
    fan_out = sweep.request.fan_out
    (outcome,) = await run_to_end([job], attempts=fan_out.attempts, retry_delay_s=fan_out.retry_delay_s)
    if outcome.state != "finished":
        raise SoupFailed(f"The soup of sweep {sweep.id} failed: {outcome.reason} Then run `stockpot soup {sweep.id}`; no trial is lost.")
    return outcome.reason


SOUP = "soup/stockpot"
"""The deployment that cooks."""


def _tags(sweep: Sweep) -> tuple[str, ...]:
    return f"sweep:{sweep.id}", f"model:{sweep.request.model}"


async def _wear_tags(sweep: Sweep) -> None:
    run_id, tags = UUID(runtime.flow_run.id), {*runtime.flow_run.tags, *_tags(sweep)}
    async with get_client() as client:
        await patiently(lambda: client.update_flow_run(run_id, tags=tags))
