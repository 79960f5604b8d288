"""Points on their way to a server that may be slow or gone: written to a local file first, sent from a thread, kept until the server
has acknowledged them. The caller never waits and never sees an error of the network, nor of a full disk: points then wait in memory alone.

The file is locked while its process lives, so that another may deliver what a dead one left. Ignores what a point means; `send` must be
idempotent, because a batch whose answer was lost is sent again.
"""

import fcntl
import io
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from stockpot.errors import ServerUnreachable

BATCH = 1000
"""Points in one request: the ledger's limit."""


class Point(NamedTuple):
    """One value of one curve; `timestamp_ms` makes sending it twice harmless."""

    name: str
    value: float
    timestamp_ms: int
    step: int


Send = Callable[[list[Point]], None]


class Spool:
    """An append-only file of points and the thread that sends them.

    path: the local file, of this process alone; it is removed once everything it holds has been acknowledged.
    send: stores at most `BATCH` points, raises `ServerUnreachable` when that is not sure.
    every_s: seconds between two deliveries.
    """

    def __init__(self, path: Path, send: Send, every_s: float = 2.0) -> None:
        self._path = path
        self._send = send
        self._every_s = every_s
        self._waiting: list[Point] = []
        self._unwritten = 0
        self.lost = 0
        """After `close`: points that are neither acknowledged nor in the file."""
        self._lock = threading.Lock()
        self._delivering = threading.Lock()
        self._closing = threading.Event()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _own(path)
        self._thread = threading.Thread(target=self._run, name="stockpot-spool", daemon=True)
        self._thread.start()

    def add(self, points: list[Point]) -> None:
        """Keep the points and return at once."""
        with self._lock:
            self._waiting.extend(points)
            lines = "".join("\n" + json.dumps(point) for point in points).encode()  # the break first: one cut off harms no later line
            with suppress(OSError):
                if self._file.write(lines) == len(lines):
                    return
            self._unwritten += len(points)

    def close(self, timeout_s: float = 30.0) -> int:
        """Try to deliver what is left for at most `timeout_s`; returns the points still not acknowledged (their file then stays)."""
        self._closing.set()
        self._thread.join(timeout_s)
        with self._lock:
            left = len(self._waiting)
            self.lost = min(left, self._unwritten)
            if left == 0:
                self._path.unlink(missing_ok=True)
            self._file.close()
        return left

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            self._deliver()
        self._deliver()

    def _deliver(self) -> None:
        while batch := self._next():
            try:
                self._send(batch)
            except ServerUnreachable:
                return
            with self._lock:
                del self._waiting[: len(batch)]

    def _next(self) -> list[Point]:
        with self._lock:
            return self._waiting[:BATCH]


def _own(path: Path) -> io.FileIO:
    """The file, locked, and under its name: one that was taken for a dead process' between its making and its locking is gone."""
    while True:
        file = io.FileIO(path, "a")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def replay(path: Path, send: Send) -> int:
    """Send what an ended process left in `path` and remove it; returns the number of points, 0 while the process lives, or where another
    one has delivered them.

    Raises `ServerUnreachable`, and the file stays.
    """
    with suppress(FileNotFoundError), path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        if not os.fstat(file.fileno()).st_nlink:
            return 0
        points = _points(file.read())
        for start in range(0, len(points), BATCH):
            send(points[start : start + BATCH])
        path.unlink(missing_ok=True)
        return len(points)
    return 0


def _points(text: str) -> list[Point]:
    """What a spool file holds; a line cut off by a crash or a full disk is left out."""
    points = []
    for line in text.split("\n"):
        with suppress(ValueError, TypeError):
            points.append(Point(*json.loads(line)))
    return points
