"""Shards on this node's disk: content-addressed, fetched once whatever the number of trials, never half.

Layout below `$XDG_CACHE_HOME` or `~/.cache`, then `stockpot/`: `sha256/<2 hex>/<64 hex>.tar`. A file of that name has that content: it is
written under another name, hashed while written, synced, then renamed. One process fetches, the others wait on a lock that the kernel
releases when the holder dies. Local disks only: the lock does not work on NFS.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from stockpot import storage
from stockpot.errors import DataError, SnapshotBroken
from stockpot.storage import Interrupted

ATTEMPTS = 5
DEADLINE_S = 50
"""Longest time without one new byte, over all attempts."""
SPARE_BYTES = 512 * 2**20
"""Left free on the disk."""


def cache_root() -> Path:
    """The node cache's folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "stockpot"


@dataclass(frozen=True)
class Fetched:
    """One file in the cache, and what it cost."""

    path: Path
    hit: bool
    read_bytes: int = 0
    retries: int = 0


@dataclass(frozen=True)
class NodeCache:
    """The files of this node."""

    root: Path = field(default_factory=cache_root)

    def path(self, sha256: str, suffix: str = ".tar") -> Path:
        """Where a content lies, once it is there."""
        return self.root / "sha256" / sha256[:2] / f"{sha256}{suffix}"

    def ensure(self, uri: str, sha256: str, size: int, suffix: str = ".tar") -> Fetched:
        """The local file with this content, fetched if need be. Raises `SnapshotBroken` when the object has other bytes."""
        target = self.path(sha256, suffix)
        if target.exists():
            return Fetched(target, hit=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".lock")):
            if target.exists():
                return Fetched(target, hit=True)
            for stale in target.parent.glob(f"{target.stem}.*.part"):
                stale.unlink()
            self.require_space(size)
            return _fetch(uri, sha256, size, target)

    def require_space(self, size: int) -> None:
        """Raise `DataError` unless that many bytes, and some to spare, are free."""
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < size + SPARE_BYTES:
            raise DataError(
                f"The node cache needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {self.root}; free some space, or point "
                "XDG_CACHE_HOME at a larger disk."
            )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a file; the kernel releases it however the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(uri: str, sha256: str, size: int, target: Path) -> Fetched:
    part = target.with_suffix(f".{os.getpid()}.part")
    body, hasher = storage.open_body(uri), hashlib.sha256()
    retries, last_byte = 0, time.monotonic()
    try:
        with part.open("wb") as file:

            def sink(piece: bytes) -> None:
                nonlocal last_byte
                file.write(piece)
                hasher.update(piece)
                last_byte = time.monotonic()

            while True:
                try:
                    body.read_into(sink)
                    break
                except Interrupted:
                    retries += 1
                    if retries >= ATTEMPTS or time.monotonic() - last_byte > DEADLINE_S:
                        raise
                    time.sleep(min(0.1 * 2**retries, 2))
            file.flush()
            os.fsync(file.fileno())
        if (body.offset, hasher.hexdigest()) != (size, sha256):
            raise SnapshotBroken(
                f"{uri} has {body.offset:,} bytes with sha256 {hasher.hexdigest()[:12]}, the manifest says {size:,} bytes with {sha256[:12]}: "
                "the object was damaged or replaced. Restore it, or publish a new snapshot."
            )
        part.chmod(0o444)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
    return Fetched(target, hit=False, read_bytes=body.offset, retries=retries)
