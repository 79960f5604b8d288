"""Trials that need not be started: the request's stop rule, asked again whenever another trial has finished."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect import get_run_logger, task

from stockpot.config import Sweep
from stockpot.outcomes import Enough
from tasks.dispatching import Outcome
from tasks.policies import TRANSIENT, in_own_process


@asynccontextmanager
async def stop_rule(sweep: Sweep, before: int) -> AsyncIterator[Callable[[list[Outcome]], Awaitable[str | None]]]:
    """What `run_to_end` asks. `before`: trials that were finished already. Logits fetched once are kept while the block runs. Where it
    cannot be told the trials go on, and it is asked again at the next change."""
    answers: dict[int, str | None] = {}
    with TemporaryDirectory(prefix="stockpot-logits-") as folder:

        async def enough(outcomes: list[Outcome]) -> str | None:
            finished = before + sum(one.state == "finished" for one in outcomes)
            if sweep.request.fan_out.stop is not None and finished not in answers:
                try:
                    answers[finished] = await spare_rest(sweep, finished, folder)
                except Exception as error:  # noqa: BLE001  (an optional rule ends no retraining, whatever fails it)
                    get_run_logger().warning("Whether more trials are needed cannot be told now (%s); they go on.", error)
            return answers.get(finished)

        yield enough


@task(name="worth of one more trial", **TRANSIENT)
async def spare_rest(sweep: Sweep, finished: int, folder: str) -> str | None:
    """Why no further trial is needed; None to go on. A decision stands: the same request run again starts none either."""
    from stockpot.ledger import tracking

    rule = sweep.request.fan_out.stop
    found = tracking.read_enough(sweep)
    if found is None and rule is not None and finished >= rule.after:
        found = await in_own_process(_judge, sweep, folder)
        if found is not None:
            tracking.record_enough(sweep.id, found)
            get_run_logger().info("No further trial is started. %s", found.reason)
    return found.reason if found else None


def _judge(sweep: Sweep, folder: str) -> Enough | None:
    from stockpot.soup.sufficiency import judge

    assert sweep.request.fan_out.stop is not None
    return judge(sweep, sweep.request.fan_out.stop, Path(folder))
