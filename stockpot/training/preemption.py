"""Being told to leave. SIGTERM is how Kubernetes, Slurm and Prefect's worker announce it; what is unsaved some seconds later is lost."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Preempted(BaseException):
    """Raised by whoever saved its work after `deferred_sigterm` said so. No `Exception`: nothing on the way may take it for a failure."""


@contextmanager
def deferred_sigterm() -> Iterator[Callable[[], bool]]:
    """Hold SIGTERM back while the block runs. Yields a function that tells whether one came.

    After the block, which may end by `Preempted`, the signal is delivered to whoever handled it before; without a handler, or if it
    returns, the process exits with 143. In a thread other than the main one, where no handler can be set, the signal is not held back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(received)
    except Preempted:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
    if received:
        if callable(before):
            os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM)
