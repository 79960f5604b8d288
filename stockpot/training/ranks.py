"""One trial on several devices of a node: one process each (a rank), gradients averaged over them by DistributedDataParallel.

The ranks run under torchrun: its agent, here a thread of the trial's own process, starts them, gives them their numbers and ends all as
soon as one has failed. The trial itself computes nothing meanwhile. It holds the ledger and the signals and hears from its ranks through
pipes; rank 0 logs, evaluates and writes the training states. All ranks stop together: told to leave, rank 0 saves a state after its step
and the others, which cannot go on without it, are ended; a rank that fails or vanishes ends all, with its reason; and no rank that can
run outlives the trial. Ranks meet over a file and talk over the loopback device (gloo) or between their GPUs (NCCL).
"""

import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed

from stockpot.checkpoints import load_weights, save_weights
from stockpot.errors import RankLost, StockpotError
from stockpot.training.candidates import Candidate
from stockpot.training.preemption import Preempted
from stockpot.training.trainer import Log

PATIENCE = timedelta(hours=4)
"""How long ranks wait for rank 0 while it evaluates. One that died is seen by its process, long before."""

LOOK_EVERY_S = 0.2
EXIT_S = 30.0
"""How long ranks that are done may take to end their processes, which torch's own threads and CUDA may hang in."""
REASON_S = 1.0
"""How long the trial listens on after the first sign of trouble: the rank that broke first may not be the one that is heard first."""


class Place(NamedTuple):
    """Where a rank stands."""

    rank: int
    world: int
    device: str


class Word(NamedTuple):
    """What a rank says to the trial: metrics and lines while it works, one last word at its end."""

    kind: str
    """`metrics`, `line`, or the last: `done` (about the step of every candidate), `left` or `failed`."""
    about: object = None
    step: int = 0


Work = Callable[[Place, Callable[[], bool], Log, Callable[[str], None]], dict[float, Candidate]]
"""What every rank does: (place, told to leave, log, say) to candidates. A picklable function; only rank 0's result counts."""


def run_on_ranks(
    world: int, work: Work, folder: Path, *, told_to_leave: Callable[[], bool], log: Log, say: Callable[[str], None]
) -> dict[float, Candidate]:
    """Do the work in `world` processes at once and return what rank 0 made.

    folder: an empty one, for the meeting and the result. Raises the stated failure of a rank, `RankLost` for one that vanished or broke,
    and `Preempted` when rank 0 saved its state and left, or a rank was lost after all were told to leave.
    """
    from stockpot.training.torchrun import Agent, RanksFailed

    context = get_context("spawn")
    leave = context.Event()
    lifeline, held = context.Pipe(duplex=False)
    words, theirs = zip(*(context.Pipe(duplex=False) for _ in range(world)), strict=True)
    agent = Agent(world, _run, (work, folder, leave, lifeline, list(theirs)))
    ranks = _Ranks(words, log, say)
    with ThreadPoolExecutor(1, "torchrun") as pool:
        running = pool.submit(agent.run)
        try:
            while not (running.done() or ranks.decided()):
                if told_to_leave():
                    leave.set()
                if agent.started():
                    for one in theirs:
                        one.close()  # the ranks have their own now, and are to be seen vanishing
                ranks.listen(LOOK_EVERY_S)
            ranks.listen(0)
            if ranks.steps is not None:
                with suppress(TimeoutError):
                    running.exception(EXIT_S)
        finally:
            held.close()  # ends every rank that can still see it
            agent.end()
    if ranks.steps is not None:  # however their processes ended after it
        return {decay: Candidate(load_weights(folder / f"{decay!r}.safetensors"), step) for decay, step in ranks.steps.items()}
    error = running.exception()
    reason = ranks.reason(error, error.codes if isinstance(error, RanksFailed) else {})
    if isinstance(reason, RankLost) and told_to_leave():
        raise Preempted from reason  # the whole group was told, and one that had only begun was ended by it
    raise reason


class _Ranks:
    """What the trial hears from its ranks."""

    def __init__(self, words: Sequence[Connection], log: Log, say: Callable[[str], None]) -> None:
        self._words = dict(enumerate(words))
        self._world = len(words)
        self._log, self._say = log, say
        self._last: dict[int, Word] = {}
        self._vanished: list[int] = []
        self._trouble_since: float | None = None

    def listen(self, seconds: float) -> None:
        """Pass on what is said within that time."""
        wait(self._words.values(), seconds)
        for rank, words in [*self._words.items()]:
            for word in self._heard(rank, words):
                self._take(rank, word)
        if self._trouble_since is None and (self._vanished or any(word.kind != "done" for word in self._last.values())):
            self._trouble_since = time.monotonic()

    def _heard(self, rank: int, words: Connection) -> Iterator[Word]:
        """What a rank has said and nobody has taken yet."""
        while True:
            try:
                if not words.poll():
                    return
                word = words.recv()
            except (EOFError, OSError):  # the end of what it says, maybe in the middle of a word
                words.close()
                del self._words[rank]
                if rank not in self._last:
                    self._vanished.append(rank)
                return
            yield word

    def _take(self, rank: int, word: Word) -> None:
        match word.kind:
            case "metrics":
                self._log(word.about, word.step)  # type: ignore[arg-type]
            case "line":
                self._say(str(word.about))
            case _:
                self._last[rank] = word

    @property
    def steps(self) -> dict[float, int] | None:
        """The step of every candidate that rank 0 made, once all ranks are done."""
        done = [word for word in self._last.values() if word.kind == "done"]
        return self._last[0].about if len(done) == self._world else None  # type: ignore[return-value]

    def decided(self) -> bool:
        """Whether those that are left can be ended: all are done, one left with its state saved or stated why it failed, or all had time
        to say more."""
        if self.steps is not None:
            return True
        if any(word.kind == "left" or isinstance(word.about, StockpotError) for word in self._last.values()):
            return True
        return self._trouble_since is not None and time.monotonic() > self._trouble_since + REASON_S

    def reason(self, error: BaseException | None, codes: dict[int, int]) -> BaseException:
        """Of all that went wrong at once, what was first: a stated failure, else a rank that vanished, else one that broke.

        error: what torchrun's agent says of it. codes: the exit codes it saw first.
        """
        for word in self._last.values():
            if word.kind == "left":
                return Preempted()
            if isinstance(word.about, StockpotError):
                return word.about
        broke = [(rank, word.about) for rank, word in self._last.items() if word.kind == "failed"]
        if broke and not self._vanished:
            rank, why = broke[0]
            return RankLost(f"Rank {rank} of {self._world} broke ({why}); all ranks were ended, and the trial's log has the traceback.")
        for rank in (*sorted(self._vanished, key=lambda rank: rank not in codes), *codes):
            ended = f"ended with exit code {codes[rank]}" if rank in codes else "vanished"
            return RankLost(f"Rank {rank} of {self._world} {ended}; all ranks were ended.")
        return RankLost(f"The ranks could not be started: {error}")


def _run(work: Work, folder: Path, leave: Event, lifeline: Connection, pipes: list[Connection]) -> None:
    """A rank's process, from its birth to its last word."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a signal to the whole group is for the trial to answer
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    rank, world, number_here = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    place = Place(rank, world, f"cuda:{number_here}" if torch.cuda.is_available() else "cpu")
    words = pipes.pop(rank)
    for other in pipes:
        other.close()

    def log(metrics: dict[str, float], step: int) -> None:
        words.send(Word("metrics", metrics, step))

    def say(line: str) -> None:
        words.send(Word("line", line))

    try:
        with _meeting(place, folder):
            first = place.rank == 0
            made = work(place, leave.is_set, log if first else lambda _metrics, _step: None, say if first else lambda _line: None)
            for decay, candidate in made.items() if first else ():
                save_weights(folder / f"{decay!r}.safetensors", candidate.weights)
        words.send(Word("done", {decay: candidate.step for decay, candidate in made.items()}))
        return
    except Preempted:
        last = Word("left")
    except StockpotError as error:
        last = Word("failed", error)
    except Exception as error:  # noqa: BLE001  (whatever the work raises, the trial says it and ends this process)
        traceback.print_exc()
        last = Word("failed", f"{type(error).__name__}: {error}")
    words.send(last)
    threading.Event().wait()  # until the trial, which now decides, ends all ranks
    raise AssertionError("the lifeline ends the process")


def _end_with(lifeline: Connection) -> None:
    """End this process as soon as the other end of the line is closed, which the trial's own end does too."""
    wait([lifeline])
    os._exit(1)


@contextmanager
def _meeting(place: Place, folder: Path) -> Iterator[None]:
    """The ranks' process group while the block runs."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    on_gpu = place.device != "cpu"
    if on_gpu:
        torch.cuda.set_device(place.device)
    store = distributed.FileStore(str(folder / "meeting"), place.world)  # type: ignore[attr-defined]
    store.set_timeout(PATIENCE)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world,
        timeout=PATIENCE,
    )
    yield
    distributed.barrier()  # no rank leaves while another still talks to it
    distributed.destroy_process_group()


def summed(counts: dict[str, int], place: Place) -> dict[str, int]:
    """Counts over all ranks; the counts themselves where there is one."""
    if place.world == 1:
        return counts
    values = torch.tensor(list(counts.values()), device=place.device)
    distributed.all_reduce(values)
    return dict(zip(counts, values.tolist(), strict=True))
