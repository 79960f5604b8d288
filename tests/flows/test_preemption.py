"""Promise: a node that shuts down costs its trial nothing but time: the state is saved at once, the next attempt goes on in the same MLflow
run, spends none of `attempts`, and ends with the bits of a trial left alone.

Everything is real: servers, worker, trial process. The worker leaves as `deployments.worker` lets it.
"""

import psutil
import pytest
import torch

from deployments.worker import leave
from stockpot.ledger import tracking
from stockpot.ledger.connection import client
from stockpot.training import journal
from stockpot.training.trials import run_trial
from tests.flows.test_retrain import pid, retrain, running_trials, runs_of, trained
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.stack, pytest.mark.timeout(2400)]


def test_a_trial_whose_node_shuts_down_goes_on_where_it_stopped(stack, request_for):
    retrain(request_for("preempted", seeds=(11,), epochs=60, attempts=1))
    (run,) = running_trials("preempted", 1)
    ledger_run = until(lambda: trained("preempted"))
    leave(psutil.Process(pid(run)).parent())
    (planned,) = tracking.read_sweep(next(tag for tag in run.tags if tag.startswith("sweep:")).removeprefix("sweep:")).trials
    saved = journal.progress(planned)
    assert saved > 0
    assert client().get_run(ledger_run).info.status == "KILLED"

    torch.set_num_threads(1)  # as the worker's environment says
    alone = run_trial(planned.model_copy(update={"model": "left-alone"}), say=print)
    first, second = until(lambda: ended_runs(f"trial:preempted:{planned.id}", 2))
    assert (first.state.type.value, second.state.type.value) == ("CRASHED", "COMPLETED")
    made = tracking.find_ingredient("preempted", planned.id)
    assert (made.weights_sha256, made.held_out) == (alone.weights_sha256, alone.held_out)
    assert made.mlflow_run_id == ledger_run
    steps = [one.step for one in client().get_metric_history(ledger_run, "train/loss")]
    assert len(steps) == len(set(steps)), "no step was done twice"
    assert min(steps) < saved < max(steps)
    ended = client().get_run(ledger_run)
    assert (ended.info.status, ended.data.tags["stockpot.attempt"]) == ("FINISHED", "2")


def ended_runs(tag, count):
    """The flow runs with a tag, oldest first, once that many have ended."""
    runs = [one for one in runs_of(tag) if one.state.is_final()]
    return runs if len(runs) == count else None
