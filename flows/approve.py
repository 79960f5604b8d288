"""A person has the last word. Started by `soup`, once for each version that passed a gate with `approval`. The run is suspended: it holds
no worker and no GPU while it waits. Resume it in Prefect and say yes or no; `stockpot promote MODEL` is the same yes.
"""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed
from pydantic import Field

from stockpot.errors import StockpotError, Transient
from stockpot.outcomes import ModelVersion
from tasks.cooking import settle_approval
from tasks.policies import stated_failure


class Approval(RunInput):
    """The form behind Resume."""

    approved: bool = Field(False, description="Make it champion. Otherwise it stays challenger.")
    note: str = Field("", max_length=400, description="Why; kept in the history of champions.")


@flow(name="approve", flow_run_name="approve-{version.model}-{version.version}", description=__doc__)
def approve(version: ModelVersion, reason: str = "") -> State[Any]:
    """Wait for a person, then carry out the answer. Resumed, the flow runs again from its first line and finds the answer there. The final
    state says what came of it."""
    asked = Approval.with_initial_data(f"Shall version {version.version} of **{version.model}** become champion?\n\n{reason}")
    answer = suspend_flow_run(wait_for_input=asked, timeout=None, key="approval")
    try:
        version = settle_approval(version, answer.approved, answer.note)
    except Transient:
        raise
    except StockpotError as error:
        return stated_failure(error)
    said = f"{'approved' if answer.approved else 'declined'} by hand{f': {answer.note}' if answer.note else ''}"
    return Completed(
        message=f"Version {version.version} of {version.model} is {version.alias or 'without an alias'}: {said}.", data=version
    )
