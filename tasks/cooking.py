"""The tasks of the soup flow: cook, register, pass the gate. Each is keyed by content, so each is safe to try again."""

from typing import Any

from prefect import get_run_logger, runtime, task
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from stockpot.outcomes import GateDecision, ModelVersion, SoupReport
from tasks.policies import TRANSIENT, flow_run_page, no_deployment

APPROVE = "approve/stockpot"
"""The deployment that waits for a person."""


@task(name="cook", **TRANSIENT)
def cook_soup(sweep_id: str) -> SoupReport:
    """Rank, average and score the ingredients of one sweep."""
    from stockpot.soup.souping import cook

    own = runtime.flow_run.id
    return cook(sweep_id, flow_run_id=own, flow_run_page=flow_run_page(own), say=get_run_logger().info)


@task(name="register", **TRANSIENT)
def register_soup(report: SoupReport) -> ModelVersion:
    """One version per soup, keyed by the digest of its weights."""
    from stockpot.release.releasing import register

    return register(report)


@task(name="gate", **TRANSIENT)
def pass_gate(report: SoupReport, version: ModelVersion) -> GateDecision:
    """Champion against challenger; moves the alias and reads it back."""
    from stockpot.ledger import tracking
    from stockpot.release.releasing import gate

    return gate(report, version, tracking.read_sweep(report.sweep_id).request.gate)


@task(name="read answer", **TRANSIENT)
def read_answer(version: ModelVersion) -> str:
    """What a person said about a version that waits for one; empty while nobody did."""
    from stockpot.release.crowning import answer

    return answer(version)


@task(name="ask for approval", **TRANSIENT)
def ask_approval(version: ModelVersion, decision: GateDecision) -> str | None:
    """Start the run that waits for a person, once for this decision, and again where that run ended (cancelled, crashed) without an answer;
    returns its page. No child of this run: Prefect suspends no subflow, and a suspended run holds no process, while a paused one holds its
    worker's slot."""
    attempt, run = 1, _approval(version, decision, 1)
    while run.state and run.state.is_final():
        attempt += 1
        run = _approval(version, decision, attempt)
    return flow_run_page(run.id)


def _approval(version: ModelVersion, decision: GateDecision, attempt: int) -> Any:
    """The flow run of this attempt to ask, started when there is none."""
    try:
        return run_deployment(
            APPROVE,
            parameters={"version": version.model_dump(mode="json"), "reason": decision.reason},
            timeout=0,
            as_subflow=False,
            idempotency_key=f"approve:{version.model}:{version.version}:{decision.champion_before}:{decision.gate_digest}:{attempt}",
            flow_run_name=f"approve-{version.model}-{version.version}",
            tags=[f"model:{version.model}", "approval"],
        )
    except ObjectNotFound as error:
        raise no_deployment(APPROVE) from error


@task(name="settle", **TRANSIENT)
def settle_approval(version: ModelVersion, approved: bool, note: str) -> ModelVersion:
    """Carry out what the person said."""
    from stockpot.release.releasing import settle

    return settle(version, approved, note)


@task(name="fetch picture", **TRANSIENT)
def fetch_picture(report: SoupReport) -> tuple[bytes, str]:
    """The soup's picture (PNG) and the address of its report, for the Prefect page."""
    from stockpot.ledger import tracking

    return tracking.read_picture(report), tracking.report_page(report)


@task(name="read alias", **TRANSIENT)
def read_alias(version: ModelVersion) -> ModelVersion:
    """The version with the alias it has now, which a later version may have taken."""
    from stockpot.ledger import registry

    return registry.read_version(version.model, version.version)
