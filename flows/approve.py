"""A person has the last word. Started by `soup`, once for each version that passed a gate with `approval`. The run is suspended: it holds
no worker and no GPU while it waits. Resume it in Prefect and say yes or no; `stockpot promote MODEL` is the same yes.
"""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
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
def approve(version: ModelVersion, reason: str = "") -> ModelVersion | State[Any]:
    """Wait for a person, then carry out the answer. Resumed, the flow runs again from its first line and finds the answer there."""
    asked = Approval.with_initial_data(f"Shall version {version.version} of **{version.model}** become champion?\n\n{reason}")
    answer = suspend_flow_run(wait_for_input=asked, timeout=None, key="approval")
    try:
        return settle_approval(version, answer.approved, answer.note)
    except Transient:
        raise
    except StockpotError as error:
        return stated_failure(error)
