"""The plain mean of files that arrive one after another, as from object storage: to the bit what `average` makes of the same files once all
are here. The next file is on its way, and hashed by whoever brings it, while one is added; each is given back once it was added.

So there are two files on the disk and one sum in memory, however many ingredients there are. A sum of float32 is as large as the model;
half precision and float64 are summed in float64. One thread adds.
"""

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from stockpot.soup.recipes.averaging import agreed, read_tensor, require_kin
from stockpot.soup.recipes.weights import Weights

Fetch = Callable[[str], Weights]
"""Brings the file of this name and opens it, in a thread of its own. Closing it gives its room on the disk back."""


def average_streamed(names: Sequence[str], sha256: Mapping[str, str], fetch: Fetch) -> dict[str, Tensor]:
    """The mean, as a state dict.

    names: of the files, at least one; what is named twice counts twice and is fetched once. sha256: of each, known beforehand.
    Raises `IngredientMismatch` as `average` does, and what `fetch` raises.
    """
    times = Counter(names)
    order = sorted(times, key=lambda name: (sha256[name], name))
    total = _Sum(len(names))
    with closing(_in_turn(order, fetch)) as files:
        for name, file in zip(order, files, strict=True):
            for _ in range(times[name]):
                total.add(file)
    return total.mean()


def _in_turn(names: Sequence[str], fetch: Fetch) -> Generator[Weights, None, None]:
    """Each file, open until the next one is asked for, which is on its way meanwhile."""
    coming: Future[Weights] | None = None
    try:
        with ThreadPoolExecutor(1) as courier:
            coming = courier.submit(fetch, names[0])
            for following in [*names[1:], None]:
                with closing(coming.result()) as file:
                    if following:
                        coming = courier.submit(fetch, following)
                    yield file
    finally:
        if coming and not coming.exception():  # what was on its way when it all ended
            coming.result().close()


class _Sum:
    """What was added so far."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._first: Weights | None = None
        self._totals: dict[str, Tensor] = {}

    def add(self, file: Weights) -> None:
        """One file more. Raises `IngredientMismatch` where it cannot be averaged with the first."""
        self._first = self._first or file
        require_kin(file, self._first)
        for name, slot in file.slots.items():
            part, total = read_tensor(file, name), self._totals.get(name)
            if not slot.dtype.is_floating_point:
                self._totals[name] = part if total is None else agreed(name, total, part, (self._first, file))
            elif slot.dtype != torch.float32:
                self._totals[name] = (torch.zeros(slot.shape, dtype=torch.float64) if total is None else total).add_(part)
            elif total is None:
                self._totals[name] = part
            else:
                np.add(total.numpy(), part.numpy(), out=total.numpy())

    def mean(self) -> dict[str, Tensor]:
        """The state dict; the sum is used up."""
        assert self._first
        for name, slot in self._first.slots.items():
            total = self._totals[name]
            if slot.dtype == torch.float32:
                np.divide(total.numpy(), np.float32(self._count), out=total.numpy())
            elif slot.dtype.is_floating_point:
                self._totals[name] = total.div_(self._count).to(slot.dtype)
        return self._totals | {name: self._totals[first] for name, first in self._first.tied.items()}
