"""One trial on one worker. Started by `retrain`, once per trial; a person may start it again by hand with the same trial."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from stockpot.config import Trial
from stockpot.errors import DeviceBusy, StockpotError, Transient
from stockpot.outcomes import Ingredient
from tasks.finetuning import finetune_trial
from tasks.policies import stated_failure


@flow(name="finetune", description=__doc__)
def finetune(trial: Trial, attempt: int = 1) -> Ingredient | State[Any]:
    """Run `trial`; the ingredient lands in the ledger. Its own fault (bad numbers, bad data) ends in a stated failure, which the
    sweep counts and does not repeat; anything else fails or crashes the run, and the sweep starts it again. So it does where every GPU is
    held, which has a name of its own, since it is no attempt."""
    try:
        return finetune_trial(trial, attempt)
    except DeviceBusy as error:
        return stated_failure(error)
    except Transient:
        raise
    except StockpotError as error:
        return stated_failure(error)
