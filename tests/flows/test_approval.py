"""Promise: what passes a gate with `approval` waits, suspended and without a process, until a person resumes it; the answer moves the
alias."""

import os

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.flow_runs import resume_flow_run

from deployments.starting import start, watch_to_end
from stockpot.config import GateSpec
from stockpot.ledger import registry
from stockpot.release.explaining import explain
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.stack, pytest.mark.timeout(2400)]


def approvals(model):
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[f"model:{model}", "approval"]))
        return client.read_flow_runs(flow_run_filter=wanted)


def once(model, state):
    """The approval's run once it is in this state."""
    return until(lambda: next((run for run in approvals(model) if run.state.name == state), None))


def retrain(request):
    return start("retrain/stockpot", {"request": request.model_dump(mode="json")}, name=f"retrain-{request.model}", tags=[])


def test_a_person_has_the_last_word(stack, request_for):
    model = "approved"
    request = request_for(model, seeds=(1,)).model_copy(update={"gate": GateSpec(approval=True)})
    watch_to_end(retrain(request))
    run = once(model, "Suspended")
    pid = int(run.infrastructure_pid.split(":")[-1])
    assert pid != os.getpid()
    until(lambda: not psutil.pid_exists(pid))  # a suspended run holds no process
    assert (registry.alias_version(model, "champion"), registry.alias_version(model, "challenger")) == (None, 1)
    watch_to_end(retrain(request))
    assert len(approvals(model)) == 1, "the same decision is asked about once"

    resume_flow_run(run.id, run_input={"approved": True, "note": "read by a test"})
    assert once(model, "Completed").state.message == "Version 1 of approved is champion: approved by hand: read by a test."
    assert (registry.alias_version(model, "champion"), registry.alias_version(model, "challenger")) == (1, None)
    assert registry.read_tags(registry.read_version(model, 1))["stockpot.approval"] == "approved by hand: read by a test"


def test_what_a_person_declines_stays_challenger_and_is_not_asked_again(stack, request_for):
    model = "declined"
    request = request_for(model, seeds=(1,)).model_copy(update={"gate": GateSpec(approval=True)})
    watch_to_end(retrain(request))
    run = once(model, "Suspended")
    assert (run.work_pool_name, registry.alias_version(model, "challenger")) == ("control", 1), "no GPU's worker has it"
    resume_flow_run(run.id, run_input={"approved": False, "note": "not today"})
    assert once(model, "Completed").state.message == "Version 1 of declined is challenger: declined by hand: not today."
    assert (registry.alias_version(model, "champion"), registry.alias_version(model, "challenger")) == (None, 1)

    again = retrain(request)
    watch_to_end(again)
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(again.id).state.message.endswith("It was declined by hand: not today.")
    assert len(approvals(model)) == 1, "an answer stands"
    assert registry.alias_version(model, "champion") is None
    assert "subject to approval: there is no champion to compare it with. It was declined by hand: not today." in explain(f"{model}/1")
