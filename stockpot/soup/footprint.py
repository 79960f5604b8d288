"""How much memory something takes: the most held since a moment, of the first GPU or of this process, as Linux counts it (proc(5))."""

from collections.abc import Callable
from pathlib import Path

import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def watch(device: str) -> Callable[[], int | None]:
    """Begin; what is returned tells the bytes held at the most since then. On a GPU those that torch allocated there; else those resident
    in this process, mapped files among them, and None where the kernel does not let a process count anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated
    try:
        CLEAR.write_text("5")  # the high-water mark is now what is resident now
    except OSError:
        return lambda: None
    return _resident_at_most


def _resident_at_most() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
