"""From a sweep to a registered version. Needs only the sweep's id, so a soup can be cooked again any time later."""

from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from stockpot.errors import StockpotError, Transient
from tasks.cooking import ask_approval, cook_soup, fetch_picture, pass_gate, read_alias, read_answer, register_soup
from tasks.patience import only_a_picture
from tasks.policies import stated_failure
from tasks.showing import show_soup


@flow(name="soup", flow_run_name="soup-{sweep_id}", description=__doc__)
def soup(sweep_id: str, attempt: int = 1) -> State[Any]:
    """Rank the sweep's ingredients on held_out, cook, score, register once, and let the gate decide on the alias. The final state carries
    the version and says what the gate said."""
    get_run_logger().info("Cooking sweep %s, attempt %d.", sweep_id, attempt)
    try:
        report = cook_soup(sweep_id)
        version = register_soup(report)
        decision = pass_gate(report, version)
        answer = read_answer(version)
        approval = ask_approval(version, decision) if decision.waits and not answer else None
        version = read_alias(version)
    except Transient:
        raise
    except StockpotError as error:
        return stated_failure(error)
    verdict = f"{decision.reason} It was {answer}." if answer else decision.reason
    with only_a_picture("The soup"):
        picture, page = fetch_picture(report)
        show_soup(report, version, verdict, picture, page, approval)
    return Completed(message=f"Version {version.version} of {version.model}: {verdict}", data=version)
