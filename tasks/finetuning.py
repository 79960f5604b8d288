"""One trial: run on this worker's device, and, for whoever waits for it, how far it has come."""

import asyncio

from prefect import get_run_logger, runtime, task

from stockpot.config import Trial
from stockpot.devices import claimed_gpus
from stockpot.errors import StockpotError
from stockpot.outcomes import Ingredient
from tasks.dispatching import Job


@task(name="trial", task_run_name="{trial.id}")
def finetune_trial(trial: Trial, attempt: int) -> Ingredient:
    """One trial from init to ingredient, holding its GPUs if the node has any. Crashes are retried by the sweep, not here."""
    from stockpot.training import journal

    journal.require_own_state(trial)
    with claimed_gpus(trial.gpus):
        from stockpot.training.trials import run_trial

        return run_trial(trial, flow_run_id=runtime.flow_run.id, attempt=attempt, say=get_run_logger().info)


async def trial_progress(job: Job) -> int:
    """How far the trial of a job has come; 0, said in the log, where the store does not tell. No task: it is asked once for every run that
    was adopted, or ended early."""
    from stockpot.training import journal

    try:
        return await asyncio.to_thread(journal.progress, Trial.model_validate(job.parameters["trial"]))
    except (StockpotError, ValueError) as error:  # ValueError: an entry of another version
        get_run_logger().warning("%s: how far it got cannot be told (%s), and counts as nothing.", job.name, error)
        return 0
