"""Reading a snapshot: `TrainReader` for training batches, `pixels` for evaluation. Exact, reproducible, and counted.

A sample is read by its place in a verified shard file of the node cache (one `pread`), so no reader can lose or repeat one. Nothing
here reads RANK, WORLD_SIZE, WDS_* or any other variable of the environment but the cache's and the store's own.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from stockpot.config import Preprocess
from stockpot.epochs import EpochPlan, derive
from stockpot.errors import BadRequest, SkipBudgetExceeded
from stockpot.images import Augment, Undecodable, decode, eval_transform, transform_digest
from stockpot.node_cache import NodeCache
from stockpot.pixel_store import Pixels, pixels
from stockpot.snapshots import Snapshot
from stockpot.splits import SPLITS

__all__ = ["Augment", "Batch", "Pixels", "TrainReader", "decode", "eval_transform", "pixels", "transform_digest"]

# B images of a batch, S side in pixels


class Batch(NamedTuple):
    """One step's images, as they left the loader: normalise on the device."""

    images: Tensor
    """uint8 B3SS."""
    labels: Tensor
    """int64 B."""


class _Wanted(NamedTuple):
    """One batch to make."""

    epoch: int
    ids: NDArray[np.int64]


class _Made(NamedTuple):
    """One batch made, and what it took."""

    images: Tensor
    labels: Tensor
    counts: dict[str, int]
    skipped: list[str]


class TrainReader:
    """The train split in batches.

    The order depends only on (snapshot, seed, epoch): not on `loader_workers`, and `batches(epoch, skip=n)` goes on exactly where n batches
    left off. `batch_size` is over all ranks; each of `world` ranks gets its share of every batch. `augment` gets the decoded image and
    a seed derived from (seed, epoch, sample); None stands for the evaluation transform.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        preprocess: Preprocess,
        augment: Augment | None,
        batch_size: int,
        seed: int,
        loader_workers: int = 0,
        skip_fraction: float = 0.0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        split: str = "train",
    ) -> None:
        if split not in snapshot.counts:
            raise BadRequest(f"Snapshot {snapshot.digest[:12]} has no split `{split}`, it has {snapshot.counts}; name another snapshot.")
        counts = np.array([shard.counts.get(split, 0) for shard in snapshot.manifest.shards], np.int64)
        first = sum(snapshot.counts.get(earlier, 0) for earlier in SPLITS[: SPLITS.index(split)])
        self.plan = EpochPlan(snapshot.digest, counts, first, seed, batch_size, rank, world, drop_last)
        self.snapshot = snapshot
        self.loader_workers = loader_workers
        self.skip_fraction = skip_fraction
        self.counters: Counter[str] = Counter(planned=0, read=0, skipped=0, bytes_from_storage=0, cache_hits=0, retries=0)
        self.skipped: list[str] = []
        self._wanted = _Schedule()
        self._samples = _Samples(snapshot, preprocess, augment, seed)
        self._loader: DataLoader[_Made] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the same on every rank."""
        return self.plan.steps

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, without the first `skip`. Raises `SnapshotBroken`, or `SkipBudgetExceeded` with the first sample."""
        planned = self.plan.planned
        skipped_before = self.counters["skipped"]
        self._wanted.plan, self._wanted.epoch, self._wanted.skip = self.plan, epoch, skip
        for made in self._made():
            self.counters.update(made.counts)
            self.skipped += made.skipped
            skipped = self.counters["skipped"] - skipped_before
            if skipped > self.skip_fraction * planned or not len(made.labels):
                raise SkipBudgetExceeded(
                    f"{skipped:,} of {planned:,} samples of epoch {epoch} are unreadable, {int(self.skip_fraction * planned):,} are allowed "
                    f"(skip_fraction {self.skip_fraction:g}). First: {self.skipped[0]}."
                )
            yield Batch(made.images, made.labels)

    def _made(self) -> Iterator[_Made]:
        if not self.loader_workers:
            for wanted in self._wanted:
                yield self._samples[wanted]
            return
        if self._loader is None:
            self.snapshot.index  # noqa: B018  fetched once here, not by every worker
            self._loader = DataLoader(
                self._samples,
                batch_size=None,
                sampler=self._wanted,
                num_workers=self.loader_workers,
                collate_fn=_as_it_is,
                multiprocessing_context="forkserver",
                persistent_workers=True,
                prefetch_factor=2,
            )
        yield from self._loader


class _Schedule(Sampler[_Wanted]):
    """What the loader asks its workers for; set before each epoch."""

    plan: EpochPlan
    epoch = 0
    skip = 0

    def __iter__(self) -> Iterator[_Wanted]:
        for ids in self.plan.batches(self.epoch, self.skip):
            yield _Wanted(self.epoch, ids)


@dataclass
class _Samples(Dataset[_Made]):
    """Makes batches from the node cache, in any process."""

    snapshot: Snapshot
    preprocess: Preprocess
    augment: Augment | None
    seed: int
    _files: dict[int, int] = field(default_factory=dict)

    def __getitem__(self, wanted: _Wanted) -> _Made:
        side = self.preprocess.size
        images = torch.empty((len(wanted.ids), 3, side, side), dtype=torch.uint8)
        labels = torch.empty(len(wanted.ids), dtype=torch.int64)
        counts: Counter[str] = Counter(planned=len(wanted.ids))
        skipped: list[str] = []
        made = 0
        rows = self.snapshot.index.rows
        for sample in wanted.ids.tolist():
            row = rows[sample]
            data = self._read(row, counts)
            try:
                images[made] = self._image(data, wanted.epoch, sample)
            except Undecodable as reason:
                shard = self.snapshot.manifest.shards[int(row["shard"])].key
                skipped.append(f"shard {shard}, sample {self.snapshot.index.key(sample)!r} {reason}")
                continue
            labels[made] = int(row["label"])
            made += 1
        counts.update(read=made, skipped=len(skipped))
        return _Made(images[:made], labels[:made], dict(counts), skipped)

    def _image(self, data: bytes, epoch: int, sample: int) -> Tensor:
        image = decode(data)
        if self.augment is None:
            return eval_transform(image, self.preprocess)
        return self.augment(image, derive(self.seed, epoch, sample))

    def _read(self, row: Any, counts: Counter[str]) -> bytes:
        shard = int(row["shard"])
        if shard not in self._files:
            entry = self.snapshot.manifest.shards[shard]
            fetched = NodeCache().ensure(self.snapshot.shard_uri(shard), entry.sha256, entry.size)
            counts.update(bytes_from_storage=fetched.read_bytes, cache_hits=int(fetched.hit), retries=fetched.retries)
            self._files[shard] = os.open(fetched.path, os.O_RDONLY)
            while len(self._files) > 64:
                os.close(self._files.pop(next(iter(self._files))))
        return os.pread(self._files[shard], int(row["size"]), int(row["offset"]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


def _as_it_is(made: _Made) -> _Made:
    return made
