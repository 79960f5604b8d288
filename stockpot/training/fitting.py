"""What would fit: after memory ran out, the same work on less, measured."""

from collections.abc import Callable

import torch


def largest_fitting(attempt: Callable[[int], None], size: int) -> int | None:
    """The first of size/2, size/4, ... 1 that `attempt` has memory for; None when not even 1 has."""
    while size > 1:
        size //= 2
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            continue
        return size
    return None
