"""How much memory a stretch of code takes at its peak, as the kernel counts it (`/proc/self/smaps_rollup`), sampled every 2 ms."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self


class Watched:
    """`grown` afterwards holds bytes of private (`Anonymous`) and of resident (`Rss`) memory at the peak, beside what was held before."""

    def __enter__(self) -> Self:
        self.before = memory_now()
        self.peak = dict(self.before)
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._watcher.join()
        self.grown = {name: self.peak[name] - self.before[name] for name in self.before}

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            now = memory_now()
            self.peak.update({name: max(self.peak[name], now[name]) for name in now})


def memory_now() -> dict[str, int]:
    """Bytes of this process, by kind."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return {name: int(line.split()[1]) * 1024 for line in lines for name in ("Anonymous", "Rss") if line.startswith(f"{name}:")}
