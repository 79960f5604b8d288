"""torchrun's agent on one node: it starts the ranks of a trial, gives them their numbers, and ends all as soon as one has failed.

torchrun's launcher would have its agent meet those of other nodes, over a port that all of them can reach and a file that grows for as long
as the trial runs. Here it is alone: it opens no port and writes no file. To be imported by who starts ranks, and no other: these modules
take long, and fail to load at a `LOGLEVEL` they do not know.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

if os.environ.get("LOGLEVEL") not in logging.getLevelNamesMapping():  # such as `info`, which others know; the ranks inherit it
    os.environ.pop("LOGLEVEL", None)

from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

HERE = "127.0.0.1"


class RanksFailed(Exception):
    """Some rank ended otherwise than by returning, or all were ended.

    codes: the exit codes of those that were first, by rank.
    """

    def __init__(self, codes: dict[int, int]) -> None:
        super().__init__(f"exit codes by rank: {codes}")
        self.codes = codes


class Agent:
    """torchrun's agent and its ranks, of which none is ever started again: the next attempt of a trial is another's decision."""

    def __init__(self, world: int, entry: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._over = threading.Event()
        spec = WorkerSpec(
            role="rank",
            local_world_size=world,
            rdzv_handler=_Alone(self._over),
            entrypoint=entry,
            args=arguments,
            max_restarts=0,
            local_addr=HERE,
        )
        self._agent = LocalElasticAgent(spec, DefaultLogsSpecs(os.devnull))

    def run(self) -> None:
        """Start the ranks, and wait until all have returned. Raises `RanksFailed`. For a thread that has nothing else to do."""
        with _silent():
            try:
                result = self._agent.run()
            except SignalException:  # ours
                raise RanksFailed({}) from None
        if result.is_failed():
            raise RanksFailed({rank: failure.exitcode for rank, failure in result.failures.items()})

    def started(self) -> bool:
        """Whether every rank has its process, and in it what it was given."""
        return self._agent.get_worker_group().state is not WorkerState.INIT

    def end(self) -> None:
        """Kill the ranks that are left, whatever they are at, or have `run` start none."""
        self._over.set()
        for worker in self._agent.get_worker_group().workers:
            with suppress(psutil.Error, TypeError):  # it has ended, or has no process yet
                process = psutil.Process(worker.id)
                if process.ppid() == os.getpid():
                    process.kill()


class _Alone(RendezvousHandler):
    """The meeting of an agent that has nobody to meet. It asks here ten times a second who else has come, and that is when it is ended."""

    def __init__(self, over: threading.Event) -> None:
        self._over = over

    def next_rendezvous(self) -> RendezvousInfo:
        self.num_nodes_waiting()
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(HERE, 0))

    def num_nodes_waiting(self) -> int:
        if self._over.is_set():
            raise SignalException("the trial ends its ranks", signal.SIGKILL)
        return 0

    def is_closed(self) -> bool:
        return self._over.is_set()

    def set_closed(self) -> None:
        self._over.set()

    def shutdown(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "alone"

    def get_run_id(self) -> str:
        return "trial"


@contextmanager
def _silent() -> Iterator[None]:
    """Keep torchrun's tracebacks of its own waiting, and its word that it sets no signal handlers in a thread, out of the trial's log."""
    names = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api", "torch.multiprocessing.spawn")
    before = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in before:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
