"""Shards on this node's disk: content-addressed, fetched once whatever the number of trials, never half.

Layout below `$XDG_CACHE_HOME` or `~/.cache`, then `stockpot/`: `sha256/<2 hex>/<64 hex>.tar`. A file of that name has that content: it is
written under another name, hashed while written, synced, then renamed. One process fetches, the others wait on a lock that the kernel
releases when the holder dies. Local disks only: the lock does not work on NFS.
"""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TextIO

from stockpot import errors, storage
from stockpot.errors import DataError, Interrupted, SnapshotBroken, StockpotError, StorageError

logger = logging.getLogger(__name__)

STANDSTILL_S = 120
"""Longest wait for another process whose fetch comes no further: its own deadlines are far shorter, so it is stopped or hangs."""

TELL_EVERY_S = 60.0
"""So often it is said for what another process is waited."""

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

    def ensure(self, uri: str, sha256: str, size: int, suffix: str = ".tar", etag: str | None = None) -> Fetched:
        """The local file with this content, fetched if need be. Raises `SnapshotBroken` when the object has other bytes."""
        target = self.path(sha256, suffix)
        if target.exists():
            return Fetched(target, hit=True)
        asked = time.monotonic()  # one clock for all processes of a node, which no one sets
        with locked(target.with_suffix(".lock"), logger.debug, lambda: sum(map(_size, _parts(target)))) as lock:
            if target.exists():
                return Fetched(target, hit=True)
            _raise_failure_since(asked, lock)
            try:
                with written(target):
                    for stale in _parts(target):  # of a process that died with the lock
                        stale.unlink()
                    self.require_space(size)
                    return _fetch(uri, sha256, size, target, etag)
            except StockpotError as error:
                _tell_failure(error, lock)
                raise

    def free(self) -> int:
        """Bytes this node may still fill."""
        with written(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        return max(0, shutil.disk_usage(self.root).free - SPARE_BYTES)

    def require_space(self, size: int) -> None:
        """Raise `DataError` unless that many bytes can be had, evicting what no one reads."""
        if self.free() < size:
            self.evict(size)
        if (free := self.free()) < size:
            raise DataError(
                f"The node cache needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {self.root}; free some space, or point "
                "XDG_CACHE_HOME at a larger disk."
            )

    def evictable(self, own: list[str]) -> int:
        """Bytes that could be had: free ones, and what `evict` would remove but for `own`."""
        with locked(self.root / "janitor.lock", logger.debug):
            return self.free() + sum(map(_size, self._idle(own)))

    @contextmanager
    def hold(self, snapshot: str, contents: list[str]) -> Iterator[None]:
        """Keep files of these sha256 from eviction while the block runs, or until this process dies. `snapshot`: its digest."""
        path = self.root / "active" / f"{snapshot}.json"
        with written(path), locked(self.root / "janitor.lock", logger.debug):
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                _write_whole(path, json.dumps(contents))
            file = path.open("rb")
            fcntl.flock(file, fcntl.LOCK_SH)
        with file:
            yield

    def evict(self, wanted: int) -> int:
        """Remove what was fetched or built longest ago until `wanted` bytes are free, parts of dead processes included; never anything of
        a snapshot that is held. Returns the number of files and folders removed."""
        with locked(self.root / "janitor.lock", logger.debug):
            removed = 0
            for path in sorted(self._idle(), key=_age):
                if self.free() >= wanted:
                    break
                if not _unlocked(path):
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
                removed += 1
            return removed

    def _idle(self, own: Iterable[str] = ()) -> list[Path]:
        """Files and folders that belong neither to a snapshot that is held nor to `own` contents; asked under the janitor's lock."""
        held = {active.stem: _held(active) for active in (self.root / "active").glob("*.json")}
        kept = {*own, *chain.from_iterable(held.values())}
        prefixes = tuple(digest[:12] for digest, contents in held.items() if contents)
        found = [path for kind in ("sha256/*/*", "pixels/*", "features/*") for path in self.root.glob(kind) if path.suffix != ".lock"]
        return [path for path in found if path.name.split(".")[0] not in kept and not path.name.startswith(prefixes)]


@contextmanager
def locked(path: Path, say: Callable[[str], None] = logger.warning, progress: Callable[[], int] | None = None) -> Iterator[TextIO]:
    """Hold the exclusive lock of a file; the kernel releases it however the process ends. Yields the file, to read and write.

    say: told that another process has it and is waited for, and so again every `TELL_EVERY_S`. progress: the bytes that process has got;
    raises `Interrupted` where they stay the same for `STANDSTILL_S`. None: whoever holds it is waited for as long as it takes.
    """
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{_holder(file)} holds {path}; waiting until it is done.")
            _wait(file, path, say, progress)
        yield file


def _wait(file: TextIO, path: Path, say: Callable[[str], None], progress: Callable[[], int] | None) -> None:
    began = told = since = time.monotonic()
    seen = progress() if progress else 0
    while True:
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.05)
        now = time.monotonic()
        if now - told > TELL_EVERY_S:
            told = now
            say(f"{_holder(file)} still holds {path}, waited for since {now - began:.0f} s; if it is stopped or hangs, end it.")
        if progress and now - since > STANDSTILL_S:
            before, seen, since = seen, progress(), now
            if seen == before:
                raise Interrupted(
                    f"{_holder(file)} holds {path} and has got no further than {seen:,} bytes for {STANDSTILL_S} s: it is stopped or "
                    "hangs. Let it go on, or end it, then start again."
                )


def _holder(file: TextIO) -> str:
    """Which process has the lock and what it does, as far as Linux tells."""
    found = os.fstat(file.fileno())
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with suppress(OSError):
        if held := re.search(rf"^\d+: FLOCK +ADVISORY +WRITE +(\d+) {place} ", Path("/proc/locks").read_text(), re.MULTILINE):
            state = re.search(r"^State:.*\((.*)\)", Path(f"/proc/{held[1]}/status").read_text(), re.MULTILINE)
            return f"Another process on this node (pid {held[1]}{f', {state[1]}' if state else ''})"
    return "Another process on this node"


WAYS_OUT = {
    "Free some space": {errno.ENOSPC, errno.EDQUOT, errno.EFBIG},
    "Let this user write there": {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST},
}


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn a failure to write a file of this node into a sentence."""
    try:
        yield
    except OSError as error:
        way_out = next((words for words, numbers in WAYS_OUT.items() if error.errno in numbers), "Mend that")
        raise DataError(f"{path} cannot be written to disk: {error.strerror or error}. {way_out}, then start again.") from error


def _write_whole(path: Path, text: str) -> None:
    """Whole or not at all: a disk that is full, or a kill, leaves no half of it."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)


def _parts(target: Path) -> list[Path]:
    return list(target.parent.glob(f"{target.stem}.*.part"))


def _tell_failure(error: StockpotError, lock: TextIO) -> None:
    """Leave a failure to those who wait for the lock; on a disk that is full they find out themselves."""
    with suppress(OSError):
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), json.dumps([time.monotonic(), type(error).__name__, str(error)]).encode())


def _raise_failure_since(asked: float, lock: TextIO) -> None:
    """Whoever waited for another process to fetch a file shares its failure, instead of waiting for the same one again."""
    lock.seek(0)
    try:
        failed, kind, sentence = json.loads(lock.read())
    except ValueError:  # no failure, or half of one by a process that was killed
        return
    if asked < failed <= time.monotonic():  # a later one is of before this node was started
        raise getattr(errors, kind, StorageError)(sentence)


def _size(path: Path) -> int:
    """Bytes of a file, or of a folder's files; of one that another process has just renamed or removed: none."""
    with suppress(FileNotFoundError):
        return sum(map(_size, path.iterdir())) if path.is_dir() else path.lstat().st_size
    return 0


def _age(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.lstat().st_mtime
    return 0


def _unlocked(path: Path) -> bool:
    """Whether no process is fetching this file."""
    lock = path.parent / f"{path.name.split('.')[0]}.lock"
    if not lock.exists():
        return True
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _held(active: Path) -> list[str]:
    """Contents of an active snapshot; of one that no process holds any more: none, and it is forgotten."""
    with active.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return list(map(str, json.load(file)))
        active.unlink()
    return []


def _fetch(uri: str, sha256: str, size: int, target: Path, etag: str | None) -> Fetched:
    part = target.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            fetched, found = storage.fetch_hashed(uri, file, etag=etag)
            os.fsync(file.fileno())
        if (fetched.size, found) != (size, sha256):
            raise SnapshotBroken(
                f"Shard {uri} has {fetched.size:,} bytes with sha256 {found[:12]}, the manifest says {size:,} bytes with {sha256[:12]}: "
                "the object was damaged or replaced. Restore it, or publish a new snapshot."
            )
        part.chmod(0o444)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
    return Fetched(target, hit=False, read_bytes=fetched.size, retries=fetched.retries)
