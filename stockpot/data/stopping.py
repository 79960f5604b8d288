"""One failure is enough: work queued behind a failed call is not begun, so that an error is said at once and not after it repeats."""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import TypeVar

Given = TypeVar("Given")
Result = TypeVar("Result")


def until_failure(run: Callable[[Given], Result]) -> Callable[[Given], Result]:
    """The same function for a pool of threads; a call that begins after another one failed raises `CancelledError`."""
    failed = threading.Event()

    def guarded(given: Given) -> Result:
        if failed.is_set():
            raise CancelledError("an earlier call failed")
        try:
            return run(given)
        except BaseException:  # an interrupt stops the queue too; all go on to the caller
            failed.set()
            raise

    return guarded
