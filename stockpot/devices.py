"""A trial's own accelerators, by locks the kernel releases: whatever way a trial ends, its device is free again.
Nothing here imports torch, so a device can be claimed before CUDA is initialised."""

import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pynvml
from filelock import FileLock, Timeout

from stockpot.errors import BadRequest, DeviceBusy


def gpu_count() -> int:
    """Accelerators the driver shows on this node, restricted by an inherited `CUDA_VISIBLE_DEVICES`; 0 without a driver."""
    return len(_visible())


@contextmanager
def claimed_gpus(count: int = 1, root: Path | None = None, wait_s: float = 180.0) -> Iterator[tuple[str, ...]]:
    """Hold `count` free GPUs of this node while the block runs and make them all that CUDA sees; none where the node has none.

    Waits up to `wait_s` for all of them, since a trial that was told to leave needs a moment, and holds none meanwhile. Raises `BadRequest`
    when the node has fewer, and `DeviceBusy` when too many stay held: the worker's limit is then too high, or an orphan still trains.
    """
    devices = _visible()
    if not devices:
        yield ()
        return
    if len(devices) < count:
        raise BadRequest(f"The trial asks for {count} GPUs, this node has {len(devices)}; ask for fewer, or start its worker on another.")
    folder = root or Path(tempfile.gettempdir()) / f"stockpot-gpus-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    held = _free(folder, devices, count, time.monotonic() + wait_s)
    try:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(held)
        yield tuple(held)
    finally:
        for lock in held.values():
            lock.release()


def _free(folder: Path, devices: list[str], count: int, end: float) -> dict[str, FileLock]:
    """Locks on `count` devices, all or none: two trials that each held a half would wait for each other."""
    while True:
        held: dict[str, FileLock] = {}
        for device in devices:
            lock = FileLock(folder / f"gpu-{device}.lock", timeout=0)
            with suppress(Timeout):
                lock.acquire()
                held[device] = lock
            if len(held) == count:
                return held
        for lock in held.values():
            lock.release()
        if time.monotonic() > end:
            raise DeviceBusy(
                f"{len(devices) - len(held)} of {len(devices)} GPUs of this node are held by other trials and {count} are asked for; start "
                f"its worker with `--limit {len(devices) // count}`."
            )
        time.sleep(random.uniform(0.5, 1.5))


def _visible() -> list[str]:
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if inherited is not None:
        return [device.strip() for device in inherited.split(",") if device.strip() and device.strip() != "-1"]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    return [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
