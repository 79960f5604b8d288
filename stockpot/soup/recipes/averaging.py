"""The mean of many weight files in one pass, in bounded memory: the result, and a chunk per thread, however many files there are.

Neighbouring float tensors are one flat run. A thread maps a stretch of it from every file, adds them up chunk by chunk, a chunk of the sum
staying in the processor's cache meanwhile, and unmaps the stretch: the traffic is one read of every file, straight from the page cache,
and one write of the result. Integer and bool tensors must be equal everywhere, but for `num_batches_tracked`,
whose largest value is taken.

Numerics. The plain mean of float32 files is summed in float32, in place in the result, and divided once: N roundings, so it is within
N * 2**-24 of mean(|x|) from the exact mean (Higham 2002, section 4.2), some 5e-7 for 8 files, a ten-thousandth of what one training step
moves. Everything else (half precision, float64, weighted sums) is summed in float64 and rounded once. Float32 sums depend on their order,
so files are always summed in the order of their sha256 (`content_order`): the result is a pure function of what is in them, the same for
any order of arguments, on any machine, with any number of threads, because additions and one division are all it takes. The sha256 of an
ingredient is in the ledger; what nobody knew is taken once.

Ignores what the weights mean: BatchNorm statistics are averaged like any tensor and never re-estimated (it can ruin a model).
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stockpot.errors import IngredientMismatch
from stockpot.soup.recipes.weights import Slot, Weights, difference

CHUNK = 1 << 18
"""Bytes of a sum that a thread works at: it stays in a second-level cache, and 32,768 float64 are the most that torch does not split over
threads of its own."""

MAPPED = 1 << 28
"""Bytes that are mapped at a time, of all files and by all threads together: fewer, and mapping takes longer than adding."""


class Run(NamedTuple):
    """Neighbouring tensors of one type: where the run starts in every file, and where in the result."""

    dtype: torch.dtype
    starts: tuple[int, ...]
    target: int
    elements: int

    def part(self, first: int, count: int) -> "Run":
        """At most `count` elements of it, from `first` on."""
        shift = first * self.dtype.itemsize
        starts = tuple(start + shift for start in self.starts)
        return Run(self.dtype, starts, self.target + shift, min(count, self.elements - first))


def average(files: Sequence[Weights], coefficients: Sequence[float] | None = None, *, threads: int | None = None) -> dict[str, Tensor]:
    """The weighted sum of the files, as a state dict of views into one buffer.

    coefficients: one per file; None is the plain mean. threads: None takes torch's own number.
    Raises `IngredientMismatch` when keys, shapes, types or ties differ, or integer tensors are unequal.
    """
    for file in files[1:]:
        require_kin(file, files[0])
    order = sorted(files[0].slots, key=lambda name: (-files[0].slots[name].dtype.itemsize, name))
    offsets, total = _offsets(files[0].slots, order)
    buffer = torch.from_numpy(np.empty(total, np.uint8))  # numpy asks for huge pages, torch does not
    files = [file.held() for file in (content_order(files) if coefficients is None else files)]  # before threads would each open it
    workers = threads or torch.get_num_threads()
    size = max(1, MAPPED // (workers * len(files) * CHUNK)) * CHUNK
    stretches = iter([stretch for run in _runs(files, order, offsets) for stretch in _stretches(run, size)])  # taken in turns
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda _: _sum(files, coefficients, stretches, buffer), range(workers)))
    state = {name: _view(buffer, files[0].slots[name], offsets[name]) for name in order}
    for name in order:
        if not state[name].is_floating_point():
            state[name].copy_(copied(files, name))
    return state | {name: state[first] for name, first in files[0].tied.items()}


def content_order(files: Sequence[Weights]) -> list[Weights]:
    """The files by sha256, whatever the order they are given in; one alone needs none."""
    return sorted(files, key=lambda file: file.sha256) if len({file.path for file in files}) > 1 else list(files)


def require_kin(file: Weights, other: Weights) -> None:
    """Raises `IngredientMismatch` when two files differ in keys, shapes, types or ties."""
    if found := difference(file, other):
        raise IngredientMismatch(f"`{file.path}` cannot be averaged with `{other.path}`: {found}.")


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
    _read(file, slot.start, raw.numpy().data)
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


def _stretches(run: Run, size: int) -> Iterator[Run]:
    count = size // run.dtype.itemsize
    return (run.part(first, count) for first in range(0, run.elements, count))


def _sum(files: Sequence[Weights], coefficients: Sequence[float] | None, stretches: Iterator[Run], buffer: Tensor) -> None:
    """Sum stretches until none is left."""
    for stretch in stretches:
        size = stretch.elements * stretch.dtype.itemsize
        target = buffer[stretch.target : stretch.target + size].view(stretch.dtype)
        with _mapped(files, stretch.starts, size) as parts:
            addends = [torch.frombuffer(part, dtype=stretch.dtype) for part in parts]
            if coefficients is None and stretch.dtype == torch.float32:
                _sum_float32([addend.numpy() for addend in addends], target.numpy())
            else:
                _sum_float64(addends, coefficients, target)
            del addends


def _sum_float32(addends: Sequence[NDArray[np.float32]], target: NDArray[np.float32]) -> None:
    step = CHUNK // 4
    for first in range(0, len(target), step):
        total, so_far = target[first : first + step], addends[0][first : first + step]
        for addend in addends[1:]:
            so_far = np.add(so_far, addend[first : first + step], out=total)
        np.divide(so_far, np.float32(len(addends)), out=total)


def _sum_float64(addends: Sequence[Tensor], coefficients: Sequence[float] | None, target: Tensor) -> None:
    step = CHUNK // 8
    room = torch.empty(step, dtype=torch.float64)
    for first in range(0, len(target), step):
        chunk = target[first : first + step]
        total = room[: len(chunk)].zero_()
        for number, addend in enumerate(addends):
            total.add_(addend[first : first + step], alpha=1.0 if coefficients is None else coefficients[number])
        chunk.copy_(total.div_(len(addends)) if coefficients is None else total)


@contextmanager
def _mapped(files: Sequence[Weights], starts: Sequence[int], size: int) -> Iterator[list[memoryview]]:
    """`size` bytes of every file from its start on, as they lie in the page cache."""
    with ExitStack() as stack:
        yield [stack.enter_context(_map(file, start, size)) for file, start in zip(files, starts, strict=True)]


@contextmanager
def _map(file: Weights, start: int, size: int) -> Iterator[memoryview]:
    before = start % mmap.ALLOCATIONGRANULARITY
    try:
        mapping = mmap.mmap(file.fd, before + size, access=mmap.ACCESS_COPY, offset=start - before)
    except ValueError as error:
        raise IngredientMismatch(f"`{file.path}` ended while it was read; fetch it again.") from error
    with mapping, memoryview(mapping)[before:] as part:
        yield part


def _read(file: Weights, start: int, into: memoryview) -> None:
    while into:
        count = os.preadv(file.fd, [into], start)
        if count == 0:
            raise IngredientMismatch(f"`{file.path}` ended while it was read; fetch it again.")
        into, start = into[count:], start + count


def _view(buffer: Tensor, slot: Slot, offset: int) -> Tensor:
    return buffer[offset : offset + slot.stop - slot.start].view(slot.dtype).view(slot.shape)


def copied(files: Sequence[Weights], name: str) -> Tensor:
    """An integer or bool tensor that all files agree on. Raises `IngredientMismatch` when they do not."""
    found = read_tensor(files[0], name)
    for file in files[1:]:
        found = agreed(name, found, read_tensor(file, name), (files[0], file))
    return found


def agreed(name: str, one: Tensor, other: Tensor, between: tuple[Weights, Weights]) -> Tensor:
    """An integer or bool tensor of two files. Raises `IngredientMismatch` when it differs, unless it only counts batches."""
    if name.rsplit(".", 1)[-1] == "num_batches_tracked":
        return torch.maximum(one, other)
    if not torch.equal(one, other):
        first, second = (file.path for file in between)
        raise IngredientMismatch(f"`{name}` is an integer tensor and differs between `{first}` and `{second}`: no mean exists.")
    return one
