"""The task that runs one trial on this worker's device."""

from prefect import get_run_logger, runtime, task

from stockpot.config import Trial
from stockpot.devices import claimed_gpus
from stockpot.outcomes import Ingredient


@task(name="trial", task_run_name="{trial.id}")
def finetune_trial(trial: Trial, attempt: int) -> Ingredient:
    """One trial from init to ingredient, holding its GPUs if the node has any. Crashes are retried by the sweep, not here."""
    with claimed_gpus(trial.gpus):
        from stockpot.training.trials import run_trial

        return run_trial(trial, flow_run_id=runtime.flow_run.id, attempt=attempt, say=get_run_logger().info)
