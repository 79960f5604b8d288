"""How long tests wait for real processes: as long as a machine a tenth as fast may need. Who gets an answer goes on at once."""

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 800.0

SOON_S = 30.0
"""What a person waits for at most to hear that a server is away: some four seconds by the product's own deadline, and a slow machine's
share. A client's usual retries take minutes."""

Found = TypeVar("Found")


def until(look: Callable[[], Found], timeout_s: float = PATIENCE_S, every_s: float = 0.1) -> Found:
    """The first true answer of `look`."""
    end = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every_s)
    return found
