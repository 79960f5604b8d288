"""Processes that this library starts, and that should not outlive who started them: one of them may hold a GPU."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this process, which `multiprocessing` started, as soon as its parent has ended, also by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
