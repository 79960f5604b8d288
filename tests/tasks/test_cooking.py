"""Promise: a person is asked once about a decision, and anew when nobody can answer any more; who cannot be asked is said at once."""

import asyncio

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Cancelled, Crashed, Suspended

from stockpot.errors import BadRequest
from stockpot.outcomes import GateDecision, ModelVersion
from tasks import cooking
from tasks.cooking import ask_approval


@flow(name="approve")
def approve() -> None:
    """Never executed: its runs' states are set by the test."""


async def approvals():
    async with get_client() as client:
        return {run.id for run in await client.read_flow_runs() if "approval" in run.tags}


async def end(run_id, state):
    async with get_client() as client:
        await client.set_flow_run_state(run_id, state, force=True)


VERSION = ModelVersion(model="asked", version=1, soup_sha256="0" * 64)
DECISION = GateDecision(promoted=False, waits=True, reason="Passed.", gate_digest="g")


def test_a_missing_deployment_is_one_sentence(server, monkeypatch):
    monkeypatch.setattr(cooking, "APPROVE", "approve/nowhere")
    with pytest.raises(BadRequest, match="no deployment `approve/nowhere`; run `stockpot deploy`"):
        ask_approval.fn(VERSION, DECISION)


@pytest.mark.slow
def test_an_approval_that_ended_without_an_answer_is_asked_for_again(deploy):
    deploy(approve, "stockpot")
    known = set()
    for state in (Cancelled(), Crashed(), Suspended()):
        ask_approval.fn(VERSION, DECISION)
        ask_approval.fn(VERSION, DECISION)
        (new,) = asyncio.run(approvals()) - known
        asyncio.run(end(new, state))
        known.add(new)
    ask_approval.fn(VERSION, DECISION)
    assert asyncio.run(approvals()) == known, "the suspended one still waits for its answer"
