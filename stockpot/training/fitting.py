"""After memory ran out: what there was no room for, in a sentence, and what would fit, measured."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from stockpot.errors import TrialFailed


def room_for(what: str, instead: str) -> Callable[[], AbstractContextManager[None]]:
    """Gives blocks in which memory running out is a `TrialFailed`: what it was for, and what to do instead."""

    @contextmanager
    def block() -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise TrialFailed(f"The device ran out of memory for {what}. {instead}") from error

    return block


def gigabytes(tensors: Iterable[Tensor], copies: float = 1) -> str:
    """How much that many copies of the tensors take."""
    return f"{copies * sum(one.numel() * one.element_size() for one in tensors) / 1e9:.2g} GB"


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
