"""One trial on several devices of a node: one process each (a rank), gradients averaged over them by DistributedDataParallel.

The trial's own process computes nothing meanwhile. It holds the ledger and the signals and hears from rank 0 through a pipe; rank 0 logs,
evaluates and writes the training states. All ranks stop together: told to leave, rank 0 saves a state after its step and the others,
which cannot go on without it, are ended; a rank that fails or vanishes ends all, with its reason; and no rank outlives the trial.
Ranks meet over a file and talk over the loopback device (gloo) or between their GPUs (NCCL).
"""

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed

from stockpot.checkpoints import load_weights, save_weights
from stockpot.errors import RankLost, StockpotError
from stockpot.processes import end_with_parent
from stockpot.training.candidates import Candidate
from stockpot.training.preemption import Preempted
from stockpot.training.trainer import Log

PATIENCE = timedelta(hours=4)
"""How long ranks wait for rank 0 while it evaluates. One that died is seen by its process, long before."""

LOOK_EVERY_S = 0.2


class Place(NamedTuple):
    """Where a rank stands."""

    rank: int
    world: int
    device: str


class Word(NamedTuple):
    """What a rank says to the trial: metrics and lines while it works, one last word at its end."""

    kind: str
    """`metrics`, `line`, or the last: `done`, `left` or `failed`."""
    about: object = None
    step: int = 0


class Rank(NamedTuple):
    """A rank's process, and the end of the pipe its words come from."""

    process: BaseProcess
    words: Connection


Work = Callable[[Place, Callable[[], bool], Log, Callable[[str], None]], dict[float, Candidate]]
"""What every rank does: (place, told to leave, log, say) to candidates. A picklable function; only rank 0's result counts."""


def run_on_ranks(
    world: int, work: Work, folder: Path, *, told_to_leave: Callable[[], bool], log: Log, say: Callable[[str], None]
) -> dict[float, Candidate]:
    """Do the work in `world` processes at once and return what rank 0 made.

    folder: an empty one, for the meeting and the result. Raises the stated failure of a rank, `RankLost` for one that vanished or broke,
    and `Preempted` when rank 0 saved its state and left.
    """
    context = multiprocessing.get_context("spawn")
    leave = context.Event()
    ranks: list[Rank] = []
    try:
        for number in range(world):
            theirs, ours = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(_place(number, world), work, folder, leave, ours), name=f"rank {number}")
            process.start()
            ours.close()
            ranks.append(Rank(process, theirs))
        last = _listen(ranks, lambda: leave.set() if told_to_leave() else None, log, say)
        if last.kind == "done":
            for rank in ranks:
                rank.process.join(30)
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
    if last.kind == "left":
        raise Preempted
    steps = last.about
    assert isinstance(steps, dict)
    return {decay: Candidate(load_weights(folder / f"{decay!r}.safetensors"), step) for decay, step in steps.items()}


def _listen(ranks: list[Rank], tick: Callable[[], None], log: Log, say: Callable[[str], None]) -> Word:
    """Pass rank 0's words on until its last one. Raises the reason as soon as any rank fails."""
    while True:
        tick()
        wait([one for rank in ranks for one in (rank.words, rank.process.sentinel)], LOOK_EVERY_S)
        ended = [not rank.process.is_alive() for rank in ranks]  # before their pipes are read to the end: an ended one has said all
        failures: list[Word] = []
        silent: list[int] = []
        last: Word | None = None
        for number, rank in reversed([*enumerate(ranks)]):  # rank 0 last: what it said before another failed is heard
            final = False
            for word in _heard(rank.words):
                match word.kind:
                    case "metrics":
                        log(word.about, word.step)  # type: ignore[arg-type]
                    case "line":
                        say(str(word.about))
                    case "failed":
                        failures.append(word)
                    case _ if number == 0:
                        last = word
                final |= word.kind in ("done", "left", "failed")
            if ended[number] and not final and rank.process.exitcode:
                silent.append(number)
        if last is not None:
            return last  # a rank that broke because rank 0 was gone is no failure
        if failures or silent:
            raise _reason(ranks, failures, silent)


def _heard(words: Connection) -> Iterator[Word]:
    try:
        while words.poll():
            yield words.recv()
    except EOFError:
        return


def _reason(ranks: list[Rank], failures: list[Word], silent: list[int]) -> StockpotError:
    """Of all that went wrong at once, what was first: a stated failure, else a rank that vanished, else one that broke."""
    for rank in ranks:
        rank.process.join(1)
        failures += [word for word in _heard(rank.words) if word.kind == "failed"]
    for word in failures:
        if isinstance(word.about, StockpotError):
            return word.about
    vanished = [number for number, rank in enumerate(ranks) if rank.process.exitcode and (rank.process.exitcode < 0 or number in silent)]
    if vanished:
        number = vanished[0]
        return RankLost(f"Rank {number} of {len(ranks)} ended with exit code {ranks[number].process.exitcode}; all ranks were ended.")
    return RankLost(f"A rank of {len(ranks)} broke ({failures[0].about}); all ranks were ended, and the trial's log has the traceback.")


def _place(rank: int, world: int) -> Place:
    return Place(rank, world, f"cuda:{rank}" if torch.cuda.is_available() else "cpu")


def _run(place: Place, work: Work, folder: Path, leave: "threading.Event", words: Connection) -> None:
    """A rank's process, from its birth to its last word."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a signal to the whole group is for the trial to answer
    end_with_parent()

    def log(metrics: dict[str, float], step: int) -> None:
        words.send(Word("metrics", metrics, step))

    def say(line: str) -> None:
        words.send(Word("line", line))

    first = place.rank == 0
    try:
        with _meeting(place, folder):
            made = work(place, leave.is_set, log if first else lambda _metrics, _step: None, say if first else lambda _line: None)
            if first:
                for decay, candidate in made.items():
                    save_weights(folder / f"{decay!r}.safetensors", candidate.weights)
                words.send(Word("done", {decay: candidate.step for decay, candidate in made.items()}))
    except Preempted:
        words.send(Word("left"))
    except StockpotError as error:
        words.send(Word("failed", error))
    except Exception as error:
        words.send(Word("failed", f"{type(error).__name__}: {error}"))
        raise


@contextmanager
def _meeting(place: Place, folder: Path) -> Iterator[None]:
    """The ranks' process group while the block runs."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    on_gpu = place.device != "cpu"
    if on_gpu:
        torch.cuda.set_device(place.device)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/meeting",
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
