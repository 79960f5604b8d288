"""Rows computed from a split, such as a tower's features: one file a node, memory-mapped, kept for whoever asks for the same rows again.

Beside the rows lies a journal with a line for every finished piece: the crc32 of its bytes, and which of its samples are unreadable. A
piece counts while its bytes have that crc32, so a killed computation goes on behind the last whole piece, and from a damaged one on all is
made again. A folder is named after what decides its rows; its name begins with the snapshot's digest, as those of `pixel_store` do, and the
janitor of the node cache takes the oldest that no process holds.
"""

# N samples of the split, D features

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stockpot.data.node_cache import NodeCache, locked, written

PIECE = 4096
"""Samples of a piece: what a kill costs at the most."""


class Piece(NamedTuple):
    """The next rows, `PIECE` of them but for the last."""

    rows: NDArray[np.float32]
    """(PIECE, D)."""
    unreadable: list[int]
    """Places in the piece that have no row of their own."""


class Rows(NamedTuple):
    """All of them, in the order of the samples."""

    rows: NDArray[np.float32]
    """(N, D), memory-mapped, read-only."""
    unreadable: NDArray[np.int64]
    """Places without a row of their own, ascending."""


def stored_rows(name: str, shape: tuple[int, int], pieces: Callable[[int], Iterator[Piece]]) -> Rows:
    """The rows of that name, what is missing of them computed and kept.

    shape: (N, D). pieces: given a sample, gives the pieces from there on. Raises `DataError` where the disk cannot hold them.
    """
    folder = NodeCache().root / "features" / name
    file, journal = folder / "rows.npy", folder / "journal"
    with locked(folder.with_suffix(".lock")):
        folder.mkdir(parents=True, exist_ok=True)
        lines = _sound(file, journal, shape)
        if len(lines) * PIECE < shape[0]:
            _compute(file, journal, lines, shape, pieces)
        told = [json.loads(line) for line in journal.read_text().splitlines()]
        unreadable = [number * PIECE + place for number, (_, places) in enumerate(told) for place in places]
        return Rows(np.load(file, mmap_mode="r"), np.array(unreadable, np.int64))


def _compute(file: Path, journal: Path, lines: list[str], shape: tuple[int, int], pieces: Callable[[int], Iterator[Piece]]) -> None:
    """Write the pieces behind those that `lines` tell of."""
    if not lines:
        NodeCache().require_space(math.prod(shape) * 4)
    with written(file):
        if not lines:
            np.lib.format.open_memmap(file, "w+", np.float32, shape)
        journal.write_text("".join(f"{line}\n" for line in lines))
        with file.open("r+b") as whole:  # a disk that fills up under a mapped file kills the process
            os.posix_fallocate(whole.fileno(), 0, file.stat().st_size)
    rows = np.load(file, mmap_mode="r+")
    for number, piece in enumerate(pieces(len(lines) * PIECE), len(lines)):
        with written(file):
            _keep(piece, rows[number * PIECE : (number + 1) * PIECE], journal)


def _keep(piece: Piece, part: np.memmap[tuple[int, int], np.dtype[np.float32]], journal: Path) -> None:
    """The piece's rows on disk first, then its line."""
    part[:] = piece.rows
    part.flush()
    with journal.open("a") as book:
        book.write(f"{json.dumps([zlib.crc32(part.data), piece.unreadable])}\n")
        book.flush()
        os.fsync(book.fileno())


def _sound(file: Path, journal: Path, shape: tuple[int, int]) -> list[str]:
    """The journal's lines up to the first whose piece is not what was written."""
    try:
        rows = np.load(file, mmap_mode="r")
        lines = journal.read_text().splitlines()
    except (OSError, ValueError, EOFError):  # nothing there, or a file cut short
        return []
    if rows.shape != shape or rows.dtype != np.float32:
        return []
    sound = 0
    for number, line in enumerate(lines):
        if not _tells(line, rows[number * PIECE : (number + 1) * PIECE]):
            break
        sound += 1
    return lines[:sound]


def _tells(line: str, part: NDArray[np.float32]) -> bool:
    try:
        crc32, _ = json.loads(line)
    except ValueError:  # a line cut short
        return False
    return bool(crc32 == zlib.crc32(part.data))
