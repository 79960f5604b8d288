"""A safetensors file as averaging wants it: the header parsed and checked, the bytes read by place (`pread`), nothing mapped or pickled.

Format: 8 bytes little-endian header length, JSON header, data. https://github.com/huggingface/safetensors
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from stockpot.digests import file_digest
from stockpot.errors import IngredientMismatch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Slot(NamedTuple):
    """One tensor: its type and shape, and the bytes it takes in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def kind(self) -> str:
        """Type and shape, as a person writes them."""
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class Weights:
    """An open safetensors file."""

    path: Path
    slots: dict[str, Slot]
    tied: dict[str, str]
    """Name to the name whose tensor it shares; stored once."""
    recorded: str | None = None
    """The sha256 of the file, where whoever opened it had it from storage or had just written it."""

    @cached_property
    def sha256(self) -> str:
        """Of the file; hashed now, once, where nobody knew it."""
        return self.recorded or file_digest(self.path)

    @cached_property
    def fd(self) -> int:
        """The open file; closed by `close`."""
        return os.open(self.path, os.O_RDONLY)

    def held(self) -> Self:
        """The file, opened now: it may lose its name on the disk, and its room is free once it is closed."""
        _ = self.fd
        return self

    def close(self) -> None:
        """Give the file back to the system."""
        if "fd" in self.__dict__:
            os.close(self.__dict__.pop("fd"))


def open_weights(path: Path, sha256: str | None = None) -> Weights:
    """Parse the header. sha256: of the file, where it is known already. Raises `IngredientMismatch` for a file that is truncated,
    of another format, or of an unknown type."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < path.stat().st_size else None
    except (OSError, ValueError, struct.error) as error:
        raise IngredientMismatch(f"`{path.name}` has no safetensors header ({error}); store the weights again.") from error
    if not isinstance(header, dict):
        raise IngredientMismatch(f"`{path.name}` ends inside its safetensors header; store the weights again.")
    tied = _tied(path, header)
    slots = {name: _slot(path, name, entry, 8 + length) for name, entry in header.items()}
    end = max((slot.stop for slot in slots.values()), default=8 + length)
    if (size := path.stat().st_size) != end:
        raise IngredientMismatch(f"`{path.name}` has {size:,} bytes, its header describes {end:,}; store the weights again.")
    return Weights(path, slots, tied, sha256)


def difference(one: Weights, other: Weights) -> str | None:
    """What keeps two files from being averaged, as the middle of a sentence; None when nothing does."""
    for name in sorted(one.slots.keys() | other.slots.keys()):
        mine, theirs = one.slots.get(name), other.slots.get(name)
        if mine is None or theirs is None or mine.kind != theirs.kind:
            return f"`{name}` is {mine.kind if mine else 'missing'} in it and {theirs.kind if theirs else 'missing'} in the other"
    if one.tied != other.tied:
        return f"it ties {one.tied or 'nothing'}, the other {other.tied or 'nothing'}"
    return None


def _tied(path: Path, header: dict[str, Any]) -> dict[str, str]:
    """The ties that `save_weights` noted, taken out of the header; none in a file of another program."""
    metadata = header.pop("__metadata__", {})
    try:
        tied = dict(json.loads(metadata["stockpot"])["tied"]) if "stockpot" in metadata else {}
        return {name: first for name, first in tied.items() if header[first]}
    except (KeyError, TypeError, ValueError) as error:
        raise IngredientMismatch(
            f"`{path.name}` has a header whose metadata is not Stockpot's ({error}); store the weights again."
        ) from error


def _slot(path: Path, name: str, entry: Any, data: int) -> Slot:
    try:
        kind, shape, (start, stop) = entry["dtype"], tuple(map(index, entry["shape"])), map(index, entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise IngredientMismatch(f"`{name}` in `{path.name}` has no type, shape and place ({error}); store the weights again.") from error
    if (dtype := DTYPES.get(str(kind))) is None:
        raise IngredientMismatch(f"`{name}` in `{path.name}` has type {kind}; averaging knows {', '.join(DTYPES)}.")
    if start < 0 or min(shape, default=0) < 0 or stop - start != dtype.itemsize * math.prod(shape):
        raise IngredientMismatch(f"`{name}` in `{path.name}` is {kind} {list(shape)} in bytes {start} to {stop}; store the weights again.")
    return Slot(dtype, shape, data + start, data + stop)
