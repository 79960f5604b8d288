"""Making one batch, in any process: samples are read by their place in verified shard files, decoded and augmented."""

import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from stockpot.data.epochs import derive
from stockpot.data.images import Undecodable
from stockpot.data.preparing import Augment, as_evaluated, decoded
from stockpot.data.snapshots import Snapshot
from stockpot.errors import StockpotError
from stockpot.preparation import Preparation

# B samples of a batch, S side in pixels, L tokens

OPEN_FILES = 64
"""Shard files a process keeps open."""


class Wanted(NamedTuple):
    """One batch to make."""

    epoch: int
    ids: NDArray[np.int64]


class Made(NamedTuple):
    """One batch made, and what it took."""

    images: Tensor
    """uint8 B3SS, in memory as the decoder leaves it: BSS3; or tokens int32 BL."""
    labels: Tensor
    """int64 B."""
    samples: NDArray[np.int64]
    """Their ids, B."""
    counts: dict[str, int]
    skipped: list[str]
    """Shard, sample and reason of every unreadable one."""


@dataclass
class Maker(Dataset[Made | StockpotError]):
    """Makes batches; it travels to loader workers as it is, without open files."""

    snapshot: Snapshot
    preprocess: Preparation
    augment: Augment | None
    seed: int
    _files: dict[int, int] = field(default_factory=dict)
    _fetched: Counter[str] = field(default_factory=Counter)

    def __getitem__(self, wanted: Wanted) -> Made | StockpotError:
        """What a loader worker hands over: a batch, or the sentence that says why there is none, which torch would bury in a traceback."""
        try:
            return self.make(wanted)
        except StockpotError as error:
            return error

    def make(self, wanted: Wanted) -> Made:
        """One batch from the node cache."""
        rows = self.snapshot.index.rows[wanted.ids]
        data = map(self._read, rows["shard"].tolist(), rows["offset"].tolist(), rows["size"].tolist())
        return self.assemble(wanted, list(map(self.input, data, wanted.ids.tolist(), repeat(wanted.epoch))))

    def input(self, data: bytes, sample: int, epoch: int) -> Tensor | Undecodable:
        """The model's input for one sample, or why there is none."""
        try:
            raw = decoded(data, self.preprocess)
        except Undecodable as reason:
            return reason
        if self.augment is None:
            return as_evaluated(raw, self.preprocess)
        return self.augment(raw, derive(self.seed, epoch, sample))

    def assemble(self, wanted: Wanted, inputs: list[Tensor | Undecodable]) -> Made:
        """A batch of what could be decoded."""
        rows = self.snapshot.index.rows[wanted.ids]
        good = [place for place, one in enumerate(inputs) if isinstance(one, Tensor)]
        bad = [(place, one) for place, one in enumerate(inputs) if isinstance(one, Undecodable)]
        skipped = [f"{self.snapshot.where(int(wanted.ids[place]))} {reason}" for place, reason in bad]
        batch = _stacked([one for one in inputs if isinstance(one, Tensor)]) if good else torch.empty(0, *self.preprocess.shape)
        labels = torch.from_numpy(rows["label"][good].astype(np.int64))
        kinds = Counter(f"skipped_{reason.kind}" for _, reason in bad)
        counts = {"planned": len(inputs), "read": len(good), "skipped": len(bad), **kinds, **self._fetched}
        self._fetched.clear()
        return Made(batch, labels, wanted.ids[good], counts, skipped)

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._files:
            while len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            fetched = self.snapshot.fetch_shard(shard)
            self._fetched.update(bytes_from_storage=fetched.read_bytes, retries=fetched.retries)
            self._files[shard] = os.open(fetched.path, os.O_RDONLY)
        return os.pread(self._files[shard], size, offset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


def _stacked(inputs: list[Tensor]) -> Tensor:
    """One batch, in a loader worker straight into the memory it shares with the trial. The colours of a pixel stay together as they were
    decoded; they are sorted by plane where the batch is normalised, which is on the GPU where there is one."""
    if inputs[0].ndim == 1:
        stacked: Tensor = default_collate(inputs)
        return stacked
    pixels_BSS3: Tensor = default_collate([image_3SS.permute(1, 2, 0) for image_3SS in inputs])
    return pixels_BSS3.permute(0, 3, 1, 2)
