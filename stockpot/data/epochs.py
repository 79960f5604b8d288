"""The order of an epoch: a pure function of (manifest digest, seed, epoch). No buffers, clocks or process ids, so resuming is an integer.

Shards are permuted; then the samples of every group of 8 shards are permuted together. Neighbours come from 8 shards, yet a node needs
only 8 shards at a time. Memory is one group, whatever the number of shards. A plan that is not `shuffled` leaves all in the index's order.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from stockpot.errors import BadRequest

GROUP = 8


def derive(*parts: int | str) -> int:
    """A 63-bit seed from what it belongs to: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class EpochPlan:
    """Batches of sample ids for one split. `counts` are the split's samples in each shard, `first` the id of its first sample."""

    identity: str
    counts: NDArray[np.int64]
    first: int
    seed: int
    batch_size: int
    rank: int = 0
    world: int = 1
    drop_last: bool = False
    shuffled: bool = True

    def __post_init__(self) -> None:
        if self.batch_size % self.world:
            raise BadRequest(f"A batch of {self.batch_size} cannot be shared by {self.world} devices; use a multiple of {self.world}.")
        if not self.steps:
            raise BadRequest(f"{self.samples:,} samples make no batch of {self.batch_size}; use a smaller batch.")

    @property
    def samples(self) -> int:
        """Samples in the split."""
        return int(self.counts.sum())

    @property
    def steps(self) -> int:
        """Batches in an epoch: the same on every rank."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + (not self.drop_last and rest // self.world > 0)

    @property
    def planned(self) -> int:
        """Samples this rank reads in an epoch. With several ranks, an unequal rest of the last batch is left out (fewer than `world`)."""
        rest = 0 if self.drop_last else (self.samples % self.batch_size) // self.world
        return self.samples // self.batch_size * (self.batch_size // self.world) + rest

    def batches(self, epoch: int, skip: int = 0) -> Iterator[NDArray[np.int64]]:
        """This rank's ids, batch by batch, without the first `skip` batches. All ranks together read the batches of a single one."""
        pending = np.empty(0, np.int64)
        step = 0
        for _, ids in self.groups(epoch):
            pending = np.concatenate([pending, ids])
            while len(pending) >= self.batch_size:
                if step >= skip:
                    yield pending[: self.batch_size][self.rank :: self.world]
                pending = pending[self.batch_size :]
                step += 1
        if step < self.steps and step >= skip:
            yield pending[: len(pending) // self.world * self.world][self.rank :: self.world]

    def shards(self, epoch: int) -> Iterator[int]:
        """Shards that hold samples of this split, in the order they are first needed."""
        for members, _ in self.groups(epoch):
            yield from members

    def groups(self, epoch: int) -> Iterator[tuple[list[int], NDArray[np.int64]]]:
        """Up to 8 shards, and their samples in the order they are read."""
        generator = self._generator(epoch)
        order = np.flatnonzero(self.counts)
        if self.shuffled:
            order = generator.permutation(order)
        for at in range(0, len(order), GROUP):
            members = order[at : at + GROUP]
            ids = np.concatenate([np.arange(*self.ids(shard)) for shard in members])
            yield members.tolist(), generator.permutation(ids) if self.shuffled else ids

    def ids(self, shard: int) -> tuple[int, int]:
        """The range of ids of this split's samples in a shard."""
        start = int(self._starts[shard])
        return start, start + int(self.counts[shard])

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return self.first + np.cumsum(self.counts) - self.counts

    def _generator(self, epoch: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=derive(self.identity, self.seed, epoch)))
