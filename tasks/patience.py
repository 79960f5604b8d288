"""A Prefect server that is away for a moment: trials go on meanwhile, so who waits for them asks again, and who draws does without."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
from prefect import get_run_logger
from prefect.exceptions import MissingContextError, PrefectHTTPStatusError
from prefect.logging import get_logger

from stockpot.errors import ServerUnreachable

AWAY_S = 600.0
"""Seconds the Prefect server may be away."""

PICTURE_S = 60.0
"""Seconds for which a picture is worth waiting for it."""

ASK_AGAIN_S = 3.0

NO_ANSWER = (httpx.TransportError, PrefectHTTPStatusError)
"""What a call to the server raises that is away; to one that refuses, too, which `Absence` tells apart."""

Answer = TypeVar("Answer")


class Absence:
    """How long a server has left every question unanswered."""

    def __init__(self, limit_s: float = AWAY_S) -> None:
        self.limit_s = limit_s
        self.since: float | None = None

    def bear(self, error: Exception) -> None:
        """Note one of `NO_ANSWER`. Raises it where the server refused, which is an answer, and `ServerUnreachable` past the limit."""
        if isinstance(error, PrefectHTTPStatusError) and error.response.is_client_error:
            raise error
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        if now - self.since >= self.limit_s:
            raise ServerUnreachable(
                f"The Prefect server has not answered for {self.limit_s:.0f} s ({type(error).__name__}); what was started may go on: look "
                "there once it is back, and run what is missing again."
            ) from error

    def end(self) -> None:
        """The server answered."""
        self.since = None


async def patiently(call: Callable[[], Awaitable[Answer]], limit_s: float = AWAY_S) -> Answer:
    """The answer of a server that may be away for `limit_s`. Raises `ServerUnreachable` after that."""
    absence = Absence(limit_s)
    while True:
        try:
            return await call()
        except NO_ANSWER as error:
            absence.bear(error)
            _log().warning("The Prefect server did not answer (%s); asking again.", type(error).__name__)
        await asyncio.sleep(ASK_AGAIN_S)


@contextmanager
def only_a_picture(what: str) -> Iterator[None]:
    """Nothing that fails in this block fails the run: it is said in the log."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  (whatever it is, the trials' weights are worth more)
        _log().warning("%s could not be drawn here, nothing else is missing: %s: %s", what, type(error).__name__, error)


def _log() -> Any:
    """The run's log; outside of one, as in a hook, the process's own."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("tasks")
