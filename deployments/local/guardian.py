"""Ends every process of a stack whose supervisor is gone, however it went: run beside the supervisor, it waits for the kernel to say so.

The processes are found by a mark in their environment, which children and their children inherit: a flow run started by a
killed worker has another parent by then, but the same mark. Standard library only, and run without site-packages, so that it
costs a few megabytes and starts at once. It inherits the stack's lock, so no new stack starts on the state before it is done.
"""

import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "STOCKPOT_STACK"
SWEEP_S = 10.0


def marked(mark: str) -> list[int]:
    """Process ids whose environment carries this stack's mark. Zombies have none, so they do not count."""
    wanted = f"{MARK}={mark}".encode()
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _carries(entry, wanted)]


def sweep(mark: str, deadline_s: float = SWEEP_S) -> list[int]:
    """Kill every process with the mark until none is left; returns those that outlive the deadline (none, unless stuck in the kernel)."""
    end = time.monotonic() + deadline_s
    while (left := marked(mark)) and time.monotonic() < end:
        for pid in left:
            _kill(pid, mark)
        time.sleep(0.02)
    return left


def _kill(pid: int, mark: str) -> None:
    with suppress(ProcessLookupError, PermissionError):
        handle = os.pidfd_open(pid)
        try:
            if _carries(Path(f"/proc/{pid}"), f"{MARK}={mark}".encode()):  # the id may have been given to another process since
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def _carries(entry: Path, wanted: bytes) -> bool:
    try:
        return wanted in (entry / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def main(supervisor: int, mark: str) -> None:
    """Wait for the supervisor's end, then sweep."""
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(supervisor)
        if os.getppid() == supervisor:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll()
    sweep(mark)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
