"""What a trial has read: in all its attempts, on all its ranks. A training state carries the counts so far.

What an attempt does after its last state counts in none: where it is killed, the next one reads those samples again, and finds in the node
cache what had arrived. Ranks add up their counts where they meet, at every logged step; a state that is saved between two of these takes
the other ranks to have done since what the first one has.
"""

from collections import Counter

import torch

from stockpot.training.candidates import State, below
from stockpot.training.ranks import Place, summed

PREFIX = "data."
"""Of the counts in a training state."""


class Account:
    """The counts of a trial, by name. resume: the state that it goes on from."""

    def __init__(self, place: Place, resume: State | None) -> None:
        self._place = place
        self._total = Counter({name: int(count) for name, count in below(resume or {}, PREFIX).items()})
        self._met: Counter[str] = Counter()
        self._open: list[Counter[str]] = []

    def open(self, counters: Counter[str]) -> None:
        """Add what these come to, all of them zero now. Every rank opens counters of the same names."""
        self._open.append(counters)

    def meet(self) -> dict[str, int]:
        """Add up what all ranks have done since they last met, for which each of them calls this; returns the counts."""
        since = self._since()
        self._total.update(summed(since, self._place))
        self._met.update(since)
        return dict(self._total)

    def state(self) -> State:
        """As part of a training state."""
        return {PREFIX + name: torch.tensor(self._total[name] + count * self._place.world) for name, count in self._since().items()}

    def _since(self) -> dict[str, int]:
        return {name: sum(one[name] for one in self._open) - self._met[name] for name in self._open[0]}
