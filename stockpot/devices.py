"""One accelerator per trial, by a lock the kernel releases: whatever way a trial ends, its device is free again.
Nothing here imports torch, so a device can be claimed before CUDA is initialised."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pynvml
from filelock import FileLock, Timeout

from stockpot.errors import DeviceBusy


def gpu_count() -> int:
    """Accelerators the driver shows on this node, restricted by an inherited `CUDA_VISIBLE_DEVICES`; 0 without a driver."""
    return len(_visible())


@contextmanager
def claimed_gpu(root: Path | None = None, wait_s: float = 180.0) -> Iterator[int | None]:
    """Hold one free GPU of this node while the block runs and make it the only one CUDA sees; None where there is no GPU.

    Waits up to `wait_s` for one, since a trial that was told to leave needs a moment. Raises `DeviceBusy` when every GPU stays held: the
    worker's limit is then higher than the number of GPUs, or an orphan still trains.
    """
    devices = _visible()
    if not devices:
        yield None
        return
    folder = root or Path(tempfile.gettempdir()) / f"stockpot-gpus-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    device, lock = _first_free(folder, devices, time.monotonic() + wait_s)
    try:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
        yield int(device) if device.isdigit() else 0
    finally:
        lock.release()


def _first_free(folder: Path, devices: list[str], end: float) -> tuple[str, FileLock]:
    while True:
        for device in devices:
            lock = FileLock(folder / f"gpu-{device}.lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                continue
            return device, lock
        if time.monotonic() > end:
            raise DeviceBusy(
                f"All {len(devices)} GPUs of this node are held by other trials; start its worker with `--limit {len(devices)}`."
            )
        time.sleep(1)


def _visible() -> list[str]:
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if inherited is not None:
        return [device.strip() for device in inherited.split(",") if device.strip() and device.strip() != "-1"]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    return [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
