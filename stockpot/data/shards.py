"""Reading a snapshot: `TrainReader` for training batches, `pixels` for evaluation. Exact, reproducible, and counted.

A sample is read by its place in a verified shard file of the node cache (one `pread`), so no reader can lose or repeat one. Nothing
here reads RANK, WORLD_SIZE, WDS_* or any other variable of the environment but the cache's and the store's own.
"""

import logging
import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import repeat
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from stockpot.data.batching import Made, Maker, Wanted
from stockpot.data.epochs import EpochPlan
from stockpot.data.images import KINDS, decode, eval_transform
from stockpot.data.node_cache import NodeCache
from stockpot.data.pixel_store import Pixels, pixels
from stockpot.data.preparing import Augment, transform_digest
from stockpot.data.skipping import may_skip
from stockpot.data.snapshots import Snapshot
from stockpot.data.stopping import until_failure
from stockpot.data.streaming import StreamedBytes
from stockpot.errors import SkipBudgetExceeded, StockpotError
from stockpot.preparation import Preparation

__all__ = ["Augment", "Batch", "Pixels", "TrainReader", "decode", "eval_transform", "pixels", "transform_digest"]

Reading = Literal["auto", "cached", "streamed"]

logger = logging.getLogger(__name__)

FETCHED_AT_ONCE = 4

COUNTED = ("planned", "read", "skipped", *(f"skipped_{kind}" for kind in KINDS), "bytes_from_storage", "cache_hits", "retries")
"""What a reader counts, and a trial logs as `data/...`."""

# B samples of a batch, S side in pixels, L tokens


class Batch(NamedTuple):
    """One step's images, or texts, as they left the loader: normalise on the device."""

    images: Tensor
    """uint8 B3SS, or tokens int32 BL."""
    labels: Tensor
    """int64 B."""
    samples: NDArray[np.int64] = np.empty(0, np.int64)
    """Their ids in the snapshot, B: those that could be read. None where no snapshot is behind the batch."""


class TrainReader:
    """One split in batches, for training; `shuffled=False` reads it in its own order, where a batch may be left without a sample.

    The order depends only on (snapshot, seed, epoch): not on `loader_workers` or `reading`, and `batches(epoch, skip=n)` goes on exactly
    where n batches left off. `batch_size` is over all ranks; each of `world` ranks gets its share of every batch. `augment` gets the
    decoded sample and a seed derived from (seed, epoch, sample); None stands for the evaluation transform. `reading` is `cached` (shards on
    this node's disk), `streamed` (nothing on disk), or `auto`: cached where the snapshot fits, said through `say`.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        preprocess: Preparation,
        augment: Augment | None,
        batch_size: int,
        seed: int,
        loader_workers: int = 0,
        skip_fraction: float = 0.0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        split: str = "train",
        shuffled: bool = True,
        reading: Reading = "auto",
        say: Callable[[str], None] = logger.info,
    ) -> None:
        counts = np.array([shard.counts.get(split, 0) for shard in snapshot.manifest.shards], np.int64)
        self.plan = EpochPlan(snapshot.digest, counts, snapshot.first(split), seed, batch_size, rank, world, drop_last, shuffled)
        self.snapshot, self.loader_workers, self.skip_fraction = snapshot, loader_workers, skip_fraction
        self.reading = choose_reading(snapshot, reading, say)
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        self.skipped: list[str] = []
        self._counting = Lock()
        self._maker = Maker(snapshot, preprocess, augment, seed)
        self._schedule = _Schedule()
        self._loader: DataLoader[Made | StockpotError] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the same on every rank."""
        return self.plan.steps

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, without the first `skip`. Raises `SnapshotBroken`, or `SkipBudgetExceeded` naming a sample."""
        skipped = 0
        with closing(self._streamed(epoch, skip) if self.reading == "streamed" else self._cached(epoch, skip)) as source:
            for made in source:
                with self._counting:
                    self.counters.update(made.counts)
                self.skipped += made.skipped
                skipped += len(made.skipped)
                if not may_skip(skipped, self.plan.planned, self.skip_fraction):
                    raise SkipBudgetExceeded(
                        f"{skipped:,} of {self.plan.planned:,} samples of epoch {epoch} are unreadable, `skip_fraction` "
                        f"allows {self.skip_fraction:g} of them. First: {made.skipped[0]}. Repair it, or allow a fraction of train."
                    )
                if self.plan.shuffled and not len(made.labels):
                    raise SkipBudgetExceeded(
                        f"A batch of epoch {epoch} has {len(made.skipped):,} samples, all unreadable, and no step can be made of nothing. "
                        f"First: {made.skipped[0]}. Repair it, or choose another batch_size."
                    )
                yield Batch(made.images, made.labels, made.samples)

    def _cached(self, epoch: int, skip: int) -> Generator[Made, None, None]:
        """From the node cache, which is filled in the order of need while batches are made."""
        with self.snapshot.held(), self._filling(epoch) as settle:
            self._schedule.plan, self._schedule.epoch, self._schedule.skip = self.plan, epoch, skip
            for made in self._loaded() if self.loader_workers else map(self._maker.make, self._schedule):
                settle(wait=False)
                yield made
            settle(wait=True)

    @contextmanager
    def _filling(self, epoch: int) -> Iterator[Callable[..., None]]:
        """Fetch the epoch's shards in the background; `settle` raises what failed."""
        self.snapshot.index  # noqa: B018  fetched once, before anything else
        pending: deque[Future[None]] = deque()
        shards = list(self.plan.shards(epoch))
        self.counters.update(cache_hits=sum(self.snapshot.is_cached(shard) for shard in shards))

        def fetch(shard: int) -> None:
            fetched = self.snapshot.fetch_shard(shard)
            self._count(fetched.read_bytes, fetched.retries)

        def settle(*, wait: bool) -> None:
            while pending and (wait or pending[0].done()):
                pending.popleft().result()

        with ThreadPoolExecutor(FETCHED_AT_ONCE, "stockpot-fill") as pool:
            wanted = until_failure(fetch)
            pending.extend(pool.submit(wanted, shard) for shard in shards)
            try:
                yield settle
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _loaded(self) -> Iterator[Made]:
        if self._loader is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["stockpot.data.shards"])
            self._loader = DataLoader(
                self._maker,
                batch_size=None,
                sampler=self._schedule,
                num_workers=self.loader_workers,
                collate_fn=_as_it_is,
                multiprocessing_context=context,
                persistent_workers=True,
                prefetch_factor=3,
            )
        for made in self._loader:
            if isinstance(made, StockpotError):
                raise made
            yield made

    def _streamed(self, epoch: int, skip: int) -> Generator[Made, None, None]:
        """From storage; samples are decoded by `loader_workers` threads of this process (decoding releases the interpreter lock)."""
        stream = StreamedBytes(self.snapshot, self.plan, epoch, skip, self._count)
        with stream.running(), ThreadPoolExecutor(max(1, self.loader_workers), "stockpot-decode") as pool:
            for ids in self.plan.batches(epoch, skip):
                data = [stream.read(sample) for sample in ids.tolist()]
                yield self._maker.assemble(Wanted(epoch, ids), list(pool.map(self._maker.input, data, ids.tolist(), repeat(epoch))))
                stream.done_with(int(ids[-1]))

    def _count(self, read_bytes: int, retries: int) -> None:
        """What a fetching thread took from storage, used or not: who leaves an epoch early has read it all the same."""
        with self._counting:
            self.counters.update(bytes_from_storage=read_bytes, retries=retries)


def choose_reading(snapshot: Snapshot, reading: Reading, say: Callable[[str], None]) -> Literal["cached", "streamed"]:
    """`auto` becomes `cached`, unless what is missing of the snapshot does not fit on this node's disk."""
    if reading != "auto":
        return reading
    if snapshot.fits():
        return "cached"
    say(
        f"Snapshot {snapshot.digest[:12]} needs {snapshot.missing_bytes() / 1e9:.2f} GB more, {NodeCache().free() / 1e9:.2f} GB are free "
        f"in {NodeCache().root}: its shards are streamed from storage, once every epoch."
    )
    return "streamed"


class _Schedule(Sampler[Wanted]):
    """What the loader asks its workers for; set before each epoch."""

    plan: EpochPlan
    epoch = 0
    skip = 0

    def __iter__(self) -> Iterator[Wanted]:
        for ids in self.plan.batches(self.epoch, self.skip):
            yield Wanted(self.epoch, ids)


def _as_it_is(made: Any) -> Any:
    return made
