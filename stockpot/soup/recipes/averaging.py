"""The mean of many weight files in one pass, in bounded memory: the result, and a chunk per thread, however many files there are.

Neighbouring float tensors are one flat run. A chunk of it stays in the processor's cache while every file adds to it, so the traffic is
one read of every file and one write of the result. Integer and bool tensors must be equal everywhere, but for `num_batches_tracked`,
whose largest value is taken.

Numerics. The plain mean of float32 files is summed in float32, in place in the result, and divided once: N roundings, so it is within
N * 2**-24 of mean(|x|) from the exact mean (Higham 2002, section 4.2), some 5e-7 for 8 files, a ten-thousandth of what one training step
moves. Everything else (half precision, float64, weighted sums) is summed in float64 and rounded once. Float32 sums depend on their order,
so files are always summed in the order of their content (`content_order`): the result is a pure function of what is in them, the same for
any order of arguments, on any machine, with any number of threads, because additions and one division are all it takes.

Ignores what the weights mean: BatchNorm statistics are averaged like any tensor and never re-estimated (it can ruin a model).
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stockpot.digests import file_digest
from stockpot.errors import IngredientMismatch
from stockpot.soup.recipes.weights import Slot, Weights, difference

CHUNK = 1 << 18
"""Bytes of a sum that a thread works at: with one file's part it stays in a second-level cache, and 32,768 float64 are the most that torch
does not split over threads of its own."""

SAMPLES = 32
"""Places at which two files are compared before their whole content is."""


class Run(NamedTuple):
    """Neighbouring tensors of one type: where the run starts in every file, and where in the result."""

    dtype: torch.dtype
    starts: tuple[int, ...]
    target: int
    elements: int
    total: type = np.float64
    """What its sums are made in."""


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
    buffer = torch.from_numpy(np.empty(total, np.uint8))  # numpy asks for huge pages, torch does not
    if coefficients is None:
        files = content_order(files)
    pieces = iter(list(_pieces(_runs(files, order, offsets), coefficients is None)))  # threads take turns at one iterator
    workers = threads or torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda _: _sum(files, coefficients, pieces, buffer), range(workers)))
    state = {name: _view(buffer, files[0].slots[name], offsets[name]) for name in order}
    for name in order:
        if not state[name].is_floating_point():
            state[name].copy_(copied(files, name))
    return state | {name: state[first] for name, first in files[0].tied.items()}


def content_order(files: Sequence[Weights]) -> list[Weights]:
    """The files by what is in them, whatever the order they are given in: by a few samples of their bytes, and where two have the same
    samples, by their sha256."""
    paths = {file.path: file for file in files}
    keys = {path: _sample(file) for path, file in paths.items()}
    if len(set(keys.values())) < len(keys):
        keys = {path: file_digest(path).encode() for path in paths}
    return sorted(files, key=lambda file: keys[file.path])


def _sample(file: Weights) -> bytes:
    size = os.fstat(file.fd).st_size
    return b"".join(os.pread(file.fd, 64, size * place // SAMPLES) for place in range(SAMPLES))


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


def _pieces(runs: Iterator[Run], plain: bool) -> Iterator[Run]:
    for run in runs:
        total = np.float32 if plain and run.dtype == torch.float32 else np.float64
        step = CHUNK // np.dtype(total).itemsize
        for first in range(0, run.elements, step):
            shift = first * run.dtype.itemsize
            starts = tuple(start + shift for start in run.starts)
            yield Run(run.dtype, starts, run.target + shift, min(step, run.elements - first), total)


def _sum(files: Sequence[Weights], coefficients: Sequence[float] | None, pieces: Iterator[Run], buffer: Tensor) -> None:
    """Sum pieces until none is left, in memory of this thread's own."""
    total, part = np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.uint8)
    for piece in pieces:
        bytes_here = piece.elements * piece.dtype.itemsize
        add = _sum_float32 if piece.total is np.float32 else partial(_sum_float64, coefficients)
        target = buffer[piece.target : piece.target + bytes_here].view(piece.dtype)
        add(files, piece, total.view(piece.total)[: piece.elements], part[:bytes_here], target)


def _sum_float32(files: Sequence[Weights], piece: Run, total: NDArray[np.float32], part: NDArray[np.uint8], target: Tensor) -> None:
    addend, into = part.view(np.float32), part.data
    _read(files[0], piece.starts[0], total.view(np.uint8).data)
    for file, start in zip(files[1:], piece.starts[1:], strict=True):
        _read(file, start, into)
        np.add(total, addend, out=total)
    np.divide(total, np.float32(len(files)), out=target.numpy())


def _sum_float64(
    coefficients: Sequence[float] | None,
    files: Sequence[Weights],
    piece: Run,
    total: NDArray[np.float64],
    part: NDArray[np.uint8],
    target: Tensor,
) -> None:
    sums, addend, into = torch.from_numpy(total).zero_(), torch.from_numpy(part).view(piece.dtype), part.data
    for number, (file, start) in enumerate(zip(files, piece.starts, strict=True)):
        _read(file, start, into)
        sums.add_(addend, alpha=1.0 if coefficients is None else coefficients[number])
    target.copy_(sums.div_(len(files)) if coefficients is None else sums)


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
    first, *others = (read_tensor(file, name) for file in files)
    if name.rsplit(".", 1)[-1] == "num_batches_tracked":
        return torch.stack([first, *others]).amax(0)
    for file, other in zip(files[1:], others, strict=True):
        if not torch.equal(first, other):
            raise IngredientMismatch(
                f"`{name}` is an integer tensor and differs between `{files[0].path}` and `{file.path}`: no mean exists."
            )
    return first
