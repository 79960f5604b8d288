"""One failure is enough: work queued behind a failed call is not begun, so that an error is said at once and not after it repeats."""

from collections.abc import Callable
from typing import TypeVar

Given = TypeVar("Given")
Result = TypeVar("Result")


def until_failure(run: Callable[[Given], Result]) -> Callable[[Given], Result]:
    """The same function for a pool of threads; a call that begins after another one failed raises what that one did."""
    failures: list[BaseException] = []

    def guarded(given: Given) -> Result:
        if failures:
            raise failures[0]
        try:
            return run(given)
        except BaseException as failure:  # an interrupt stops the queue too; all go on to the caller
            failures.append(failure)
            raise

    return guarded
