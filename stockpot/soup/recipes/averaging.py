"""The mean of many weight files in one pass, in bounded memory: the result, and a chunk per thread, however many files there are.

Neighbouring float tensors are one flat run. A chunk of it stays in the processor's cache while every file adds to it, so the traffic is
one read of every file and one write of the result. Sums are float64 and rounded once, so the order of the files does not matter.
Integer and bool tensors must be equal everywhere, but for `num_batches_tracked`, whose largest value is taken.

Ignores what the weights mean: BatchNorm statistics are averaged like any tensor and never re-estimated (it can ruin a model).
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from stockpot.errors import IngredientMismatch
from stockpot.soup.recipes.weights import Slot, Weights, difference

CHUNK = 3 << 13
"""Elements a thread sums at a time: 192 KB of float64, which stay in the second-level cache, and fewer than torch would split over threads
of its own (32,768)."""


class Run(NamedTuple):
    """Neighbouring tensors of one type: where the run starts in every file, and where in the result."""

    dtype: torch.dtype
    starts: tuple[int, ...]
    target: int
    elements: int


def average(files: Sequence[Weights], coefficients: Sequence[float] | None = None, *, threads: int | None = None) -> dict[str, Tensor]:
    """The weighted sum of the files, as a state dict of views into one buffer.

    coefficients: one per file; None is the plain mean. threads: None takes torch's own number.
    Raises `IngredientMismatch` when keys, shapes, types or ties differ, or integer tensors are unequal.
    """
    for file in files[1:]:
        if found := difference(file, files[0]):
            raise IngredientMismatch(f"`{file.path}` cannot be averaged with `{files[0].path}`: {found}.")
    order = sorted(files[0].slots, key=lambda name: (-files[0].slots[name].dtype.itemsize, name))
    offsets, total = _offsets(files[0].slots, order)
    buffer = torch.empty(total, dtype=torch.uint8)
    scale = Scale(coefficients, len(files))
    with ThreadPoolExecutor(threads or torch.get_num_threads()) as pool:
        list(pool.map(lambda piece: _sum(files, piece, scale, buffer), _pieces(_runs(files, order, offsets))))
    state = {name: _view(buffer, files[0].slots[name], offsets[name]) for name in order}
    for name in order:
        if not state[name].is_floating_point():
            state[name].copy_(_same(files, name))
    return state | {name: state[first] for name, first in files[0].tied.items()}


class Scale(NamedTuple):
    """The coefficients, or the plain mean: there a sum divided once loses no bit to rounded weights."""

    coefficients: Sequence[float] | None
    files: int

    def add(self, total: Tensor, part: Tensor, file: int) -> None:
        """Add one file's part."""
        if self.coefficients is None:
            total.add_(part)
        else:
            total.add_(part, alpha=self.coefficients[file])

    def finish(self, total: Tensor) -> Tensor:
        """What the sum stands for."""
        return total.div_(self.files) if self.coefficients is None else total


def first_non_finite(file: Weights) -> str | None:
    """The name of the first float tensor with a NaN or an infinity in it; None when all are numbers."""
    for name, slot in file.slots.items():
        if slot.dtype.is_floating_point and not bool(torch.isfinite(read_tensor(file, name)).all()):
            return name
    return None


def read_tensor(file: Weights, name: str) -> Tensor:
    """One tensor of a file, in memory of its own."""
    slot = file.slots[name]
    raw = torch.empty(slot.stop - slot.start, dtype=torch.uint8)
    _read(file, slot.start, raw)
    return raw.view(slot.dtype).view(slot.shape)


def _offsets(slots: dict[str, Slot], order: Sequence[str]) -> tuple[dict[str, int], int]:
    offsets: dict[str, int] = {}
    at = 0
    for name in order:
        offsets[name] = at
        at += slots[name].stop - slots[name].start
    return offsets, at


def _runs(files: Sequence[Weights], order: Sequence[str], offsets: dict[str, int]) -> Iterator[Run]:
    """Float tensors joined where every file has them side by side."""
    run: Run | None = None
    for name in order:
        slot = files[0].slots[name]
        if not slot.dtype.is_floating_point:
            continue
        size, starts = slot.stop - slot.start, tuple(file.slots[name].start for file in files)
        if run and run.dtype == slot.dtype:
            end = run.elements * slot.dtype.itemsize
            if offsets[name] == run.target + end and all(start == before + end for start, before in zip(starts, run.starts, strict=True)):
                run = run._replace(elements=run.elements + size // slot.dtype.itemsize)
                continue
        if run:
            yield run
        run = Run(slot.dtype, starts, offsets[name], size // slot.dtype.itemsize)
    if run:
        yield run


def _pieces(runs: Iterator[Run]) -> Iterator[Run]:
    for run in runs:
        for first in range(0, run.elements, CHUNK):
            shift = first * run.dtype.itemsize
            yield Run(run.dtype, tuple(start + shift for start in run.starts), run.target + shift, min(CHUNK, run.elements - first))


def _sum(files: Sequence[Weights], piece: Run, scale: Scale, buffer: Tensor) -> None:
    size = piece.elements * piece.dtype.itemsize
    raw = torch.empty(size, dtype=torch.uint8)
    total = torch.zeros(piece.elements, dtype=torch.float64)
    for number, file in enumerate(files):
        _read(file, piece.starts[number], raw)
        scale.add(total, raw.view(piece.dtype), number)
    buffer[piece.target : piece.target + size].view(piece.dtype).copy_(scale.finish(total))


def _read(file: Weights, start: int, raw: Tensor) -> None:
    view = memoryview(raw.numpy().data)
    while view:
        count = os.preadv(file.fd, [view], start)
        if count == 0:
            raise IngredientMismatch(f"`{file.path}` ended while it was read; fetch it again.")
        view, start = view[count:], start + count


def _view(buffer: Tensor, slot: Slot, offset: int) -> Tensor:
    return buffer[offset : offset + slot.stop - slot.start].view(slot.dtype).view(slot.shape)


def _same(files: Sequence[Weights], name: str) -> Tensor:
    first, *others = (read_tensor(file, name) for file in files)
    if name.rsplit(".", 1)[-1] == "num_batches_tracked":
        return torch.stack([first, *others]).amax(0)
    for file, other in zip(files[1:], others, strict=True):
        if not torch.equal(first, other):
            raise IngredientMismatch(
                f"`{name}` is an integer tensor and differs between `{files[0].path}` and `{file.path}`: no mean exists."
            )
    return first
