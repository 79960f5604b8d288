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
    """Kill every process with the mark until none is left; returns those that outlive the deadline (none, unless stuck in the kernel).

    Each is waited for to its very end: a dying process loses its environment, and so its mark, before its ports are free.
    """
    end = time.monotonic() + deadline_s
    while (left := marked(mark)) and time.monotonic() < end:
        dying = [handle for pid in left for handle in _killed(pid, mark)]
        for handle in dying:
            _wait(handle, max(0.0, end - time.monotonic()))
            os.close(handle)
    return left


def _killed(pid: int, mark: str) -> list[int]:
    """A handle of the process after SIGKILL; none when it is gone, or its id was given to another process since."""
    with suppress(ProcessLookupError, PermissionError):
        handle = os.pidfd_open(pid)
        try:
            if _carries(Path(f"/proc/{pid}"), f"{MARK}={mark}".encode()):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                return [handle]
        except ProcessLookupError:
            pass
        os.close(handle)
    return []


def _wait(handle: int, timeout_s: float | None = None) -> None:
    """Until the process behind a handle has ended."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.poll(None if timeout_s is None else timeout_s * 1000)


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
            _wait(handle)
    sweep(mark)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
