"""Evaluation input: every sample of a split once, preprocessed, memory-mapped, built once per node and shared by all trials."""

import json
import math
import os
import shutil
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stockpot.data.images import Undecodable
from stockpot.data.node_cache import NodeCache, locked, written
from stockpot.data.preparing import DECODERS, prepare, transform_digest
from stockpot.data.snapshots import Snapshot
from stockpot.digests import short
from stockpot.errors import SkipBudgetExceeded, SnapshotBroken
from stockpot.preparation import Preparation

# N samples of the split, S side in pixels, L tokens

_KNOWN: dict[tuple[int, int, int], int] = {}
"""Checksums by device, inode and time of change, so that a process reads a store once to check it."""


@dataclass(frozen=True)
class Pixels:
    """A split, ready for the model."""

    images: NDArray[np.uint8] | NDArray[np.int32]
    """Memory-mapped, read-only, N3SS, or tokens NL; normalise on the device."""
    labels: NDArray[np.int64]
    keys: tuple[str, ...]
    transform_digest: str


def pixels(snapshot: Snapshot, split: str, preprocess: Preparation) -> Pixels:
    """Every sample of a split in index order, none skipped. Raises `SkipBudgetExceeded` naming the first unreadable one."""
    start = snapshot.first(split)
    with snapshot.held():
        rows = snapshot.index.rows[start : start + snapshot.counts[split]]
        folder = _folder(snapshot, split, preprocess, rows, start)
        images = np.load(folder / "images.npy", mmap_mode="r")
        keys = tuple(snapshot.index.keys(start, start + len(rows)))
    if not len(images) == len(rows) == len(keys):
        raise SnapshotBroken(f"{folder} holds {len(images):,} samples of {split}, the manifest says {len(rows):,}; remove the folder.")
    return Pixels(images, rows["label"].astype(np.int64), keys, transform_digest(preprocess))


def _folder(snapshot: Snapshot, split: str, preprocess: Preparation, rows: NDArray[np.void], first: int) -> Path:
    """The folder of this split on this node, built under a lock if need be. `first`: id of the sample in the first row."""
    identity = f"{snapshot.digest[:12]}-{short([snapshot.digest, split, transform_digest(preprocess), DECODERS])}"
    cache = NodeCache()
    folder = cache.root / "pixels" / identity
    if _whole(folder):
        return folder
    with written(folder), locked(folder.with_suffix(".lock")):
        if _whole(folder):
            return folder
        for stale in (folder, *folder.parent.glob(f"{identity}.*.part")):
            shutil.rmtree(stale, ignore_errors=True)
        cache.require_space(len(rows) * math.prod(preprocess.shape) * np.dtype(preprocess.dtype).itemsize)
        part = Path(tempfile.mkdtemp(prefix=f"{identity}.", suffix=".part", dir=folder.parent))
        try:
            _build(part / "images.npy", snapshot, preprocess, rows, first)
            (part / "meta.json").write_text(json.dumps({"images_crc32": _crc32(part / "images.npy")}))
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _build(path: Path, snapshot: Snapshot, preprocess: Preparation, rows: NDArray[np.void], first: int) -> None:
    with written(path):
        images = np.lib.format.open_memmap(path, "w+", preprocess.dtype, (len(rows), *preprocess.shape))
        with path.open("r+b") as file:  # a disk that fills up under a mapped file kills the process without a word
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    bounds = np.flatnonzero(np.diff(rows["shard"], prepend=-1, append=-1))
    cached = snapshot.fits()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start, stop in pairwise(bounds):
            shard = int(rows["shard"][start])
            data = np.memmap(snapshot.fetch_shard(shard).path, mode="r") if cached else snapshot.read_shard(shard)[0]
            some = rows[start:stop]
            places = zip(some["offset"].tolist(), some["size"].tolist(), strict=True)
            encoded = (bytes(data[offset : offset + size]) for offset, size in places)
            for at, one in enumerate(pool.map(lambda data: _prepared(data, preprocess), encoded), int(start)):
                if isinstance(one, str):
                    raise SkipBudgetExceeded(f"{snapshot.where(first + at)} {one}; an evaluation allows none. Publish a new snapshot.")
                images[at] = one.numpy()
    images.flush()


def _prepared(data: bytes, preprocess: Preparation) -> Tensor | str:
    try:
        return prepare(data, preprocess)
    except Undecodable as reason:
        return str(reason)


def _whole(folder: Path) -> bool:
    """Whether the pictures are all there, and as they were built: a node's disk is trusted no longer than that."""
    try:
        built = json.loads((folder / "meta.json").read_text())
        return bool(built["images_crc32"] == _crc32(folder / "images.npy"))
    except (OSError, ValueError, KeyError, TypeError):  # not there, or cut short by the node's end
        return False


def _crc32(path: Path) -> int:
    """Of a file's bytes, as this process found them first; reading them also warms the page cache for the evaluation that follows."""
    facts = path.stat()
    found = (facts.st_dev, facts.st_ino, facts.st_mtime_ns)
    if found not in _KNOWN:
        _KNOWN[found] = zlib.crc32(np.memmap(path, np.uint8, mode="r").data)
    return _KNOWN[found]
