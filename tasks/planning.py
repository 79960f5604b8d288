"""What happens before a GPU is taken: pin the data, prepare the shared init, draw the trials, open the sweep in the ledger.
Library modules are imported inside the tasks: importing a flow must stay cheap."""

from functools import partial
from typing import Literal

from prefect import get_run_logger, runtime, task

from stockpot.config import Init, PinnedData, RetrainRequest, Sweep
from stockpot.outcomes import Accuracy
from stockpot.sweeps import allotted, plan
from tasks.policies import TRANSIENT, flow_run_page, in_own_process


@task(name="pin data", **TRANSIENT)
def pin_data(request: RetrainRequest) -> PinnedData:
    """Every snapshot of the request by content: from here on nobody lists or globs."""
    from stockpot.data.snapshots import pin

    data = request.data
    return PinnedData(
        snapshot=pin(data.snapshot),
        test=pin(data.test) if data.test else None,
        shifts={name: pin(uri) for name, uri in sorted(data.shifts.items())},
    )


@task(name="prepare init", **TRANSIENT)
async def prepare_init(request: RetrainRequest, data: PinnedData) -> Init:
    """The shared start of all trials, built once and found again by its key."""
    init: Init = await in_own_process(_prepare, request, data, say=get_run_logger().info)
    return init


def _prepare(request: RetrainRequest, data: PinnedData) -> Init:
    from stockpot.soup.borrowing import require_lenders
    from stockpot.training.inits import prepare
    from stockpot.training.probing import probed
    from stockpot.training.rehearsal import rehearse, require_same_classes

    allotted(request)
    require_same_classes(data)
    read = request.data
    probe = partial(probed, loader_workers=read.loader_workers, skip_fraction=read.skip_fraction, reading=read.reading)
    init = prepare(
        request.base, request.init, data.snapshot, request.store, probe, partial(rehearse, request.sweep, sharded=request.fan_out.sharded)
    )
    require_lenders(request.soup, init)
    return init


@task(name="open sweep", **TRANSIENT)
def open_sweep(request: RetrainRequest, data: PinnedData, init: Init) -> Sweep:
    """Draw the trials and write the sweep into the ledger, where `soup` finds it by id."""
    from stockpot.ledger import tracking

    sweep = plan(request, data, init)
    tracking.open_sweep(sweep, flow_run_id=runtime.flow_run.id, flow_run_page=flow_run_page(runtime.flow_run.id))
    return sweep


@task(name="count ingredients", **TRANSIENT)
def finished_trials(sweep: Sweep) -> dict[str, str]:
    """Trial id to held-out accuracy as text, of every trial of the sweep that has an ingredient in the ledger, or had one until the sweep's
    soup was a registered version: what was pruned since is not trained again."""
    from stockpot.ledger import tracking
    from stockpot.release.pruning import no_longer_needed

    pruned = {trial: f"{_told(score) if score else 'unfit'}, pruned since" for trial, score in no_longer_needed(sweep).items()}
    return pruned | {one.trial_id: _told(one.held_out) for one in tracking.find_ingredients(sweep) if not one.ema_decay}


def _told(accuracy: Accuracy) -> str:
    return f"{accuracy.value:.4f} ({accuracy.correct} of {accuracy.seen})"


@task(name="close sweep", **TRANSIENT)
def close_sweep(sweep: Sweep, status: Literal["FINISHED", "FAILED"], counts: dict[str, int]) -> None:
    """End the sweep's run in the ledger with its counts."""
    from stockpot.ledger import tracking

    tracking.close_sweep(sweep.id, status, counts)


def end_cancelled_sweep(sweep_id: str) -> None:
    """Say in the ledger that a sweep was cancelled. No task: it is called from a hook, outside any run."""
    from stockpot.ledger import tracking

    tracking.close_sweep(sweep_id, "KILLED", {})
