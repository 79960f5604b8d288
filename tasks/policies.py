"""The policies themselves: what is worth another try, what a stated failure looks like on the Prefect page, and work that
should give its memory back when it is done."""

import asyncio
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from logging.handlers import QueueHandler, QueueListener
from typing import Any

from prefect import get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.settings import PREFECT_UI_URL
from prefect.states import Failed
from prefect.tasks import Task

from stockpot.errors import BadRequest, StockpotError, Transient
from stockpot.processes import end_with_parent


async def _worth_a_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001  (Prefect's signature)
    """A server that did not answer may answer soon; a stated failure will be the same every time."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, Transient) or not isinstance(error, StockpotError)


TRANSIENT: dict[str, Any] = {
    "retries": 4,
    "retry_delay_seconds": [2, 10, 30, 60],
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": _worth_a_retry,
    "cache_policy": NO_CACHE,  # the ledger is the memory; a remembered answer would be a stale one
}
"""For calls to servers: about two minutes, long enough for a restart."""


def stated_failure(error: StockpotError) -> State[Any]:
    """The failed state that shows the error's sentence, named by its class, instead of a traceback."""
    get_run_logger().error(str(error))
    return Failed(message=str(error), name=type(error).__name__)


def flow_run_page(flow_run_id: Any) -> str | None:
    """The address of a flow run's page for a browser; None where no server with pages is known."""
    pages = PREFECT_UI_URL.value()
    return f"{pages}/runs/flow-run/{flow_run_id}" if pages else None


def no_deployment(name: str) -> BadRequest:
    """What a flow run of this deployment cannot be started for. To be raised."""
    return BadRequest(f"The Prefect server has no deployment `{name}`; run `stockpot deploy`, or name another one in the request.")


async def in_own_process(call: Callable[..., Any], *arguments: Any, say: Callable[[str], None] | None = None) -> Any:
    """Run a library call in a fresh process: a parent that waits for hours must not keep torch and a model in memory. The process ends with
    its parent, however that ends, and at once when the wait for it does.

    say: called with every line that the library logs there, from another thread. None: they go where that process sends them.
    """
    context = multiprocessing.get_context("spawn")
    if say is None:
        return await _called(ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent), call, *arguments)
    lines = context.Queue()
    listener = QueueListener(lines, _Telling(say))
    listener.start()
    try:
        return await _called(ProcessPoolExecutor(1, mp_context=context, initializer=_log_into, initargs=(lines,)), call, *arguments)
    finally:
        listener.stop()


async def _called(pool: ProcessPoolExecutor, call: Callable[..., Any], *arguments: Any) -> Any:
    with pool:
        pid = await asyncio.wrap_future(pool.submit(os.getpid))
        try:
            return await asyncio.wrap_future(pool.submit(call, *arguments))
        except BaseException as error:
            if not isinstance(error, Exception):  # nobody waits any more, and the call may take hours, and a GPU
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise


class _Telling(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())


def _log_into(lines: Any) -> None:
    """In the fresh process, before the call."""
    end_with_parent()
    library = logging.getLogger("stockpot")
    library.addHandler(QueueHandler(lines))
    library.setLevel(logging.INFO)
