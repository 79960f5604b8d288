"""One epoch through each reader, with two loader workers and batches of 64: ours, the limit, the obvious build. `_peers` has the others.

Each has an `epoch()` that reads every sample once and returns the seconds it took; workers are started and files are warm before the first
timed epoch. Peers decode and resize with the very function that ours uses.
"""

import io
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any, Protocol

import s3fs
import torch
import webdataset as wds
from torch.utils.data import DataLoader

from stockpot.data.images import decode, eval_transform
from stockpot.data.shards import TrainReader
from stockpot.data.snapshots import Snapshot
from stockpot.preparation import Preprocess

WORKERS, BATCH = 2, 64
PREPROCESS = Preprocess(size=224, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))


class Reader(Protocol):
    """Something that can read the whole split."""

    def epoch(self) -> float: ...


def image_of(data: bytes) -> torch.Tensor:
    """What every reader but the obvious one does to a sample."""
    return eval_transform(decode(data), PREPROCESS)


class Ours:
    """Warm node cache."""

    def __init__(self, snapshot: Snapshot, split: str) -> None:
        self.reader = TrainReader(
            snapshot, preprocess=PREPROCESS, augment=None, batch_size=BATCH, seed=0, loader_workers=WORKERS, split=split, reading="cached"
        )
        self.number = 0

    def epoch(self) -> float:
        began = time.perf_counter()
        read = sum(len(batch.labels) for batch in self.reader.batches(self.number))
        self.number += 1
        assert read == self.reader.plan.samples
        return time.perf_counter() - began


class Limit:
    """Pure decode and resize: bytes in memory, two bare processes, nothing returned."""

    def __init__(self, images: list[bytes]) -> None:
        context = multiprocessing.get_context("fork")
        self.pipes, self.processes = [], []
        for rank in range(WORKERS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_decode_on_demand, args=(theirs, images[rank::WORKERS]), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def epoch(self) -> float:
        began = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(True)
        for pipe in self.pipes:
            pipe.recv()
        return time.perf_counter() - began


def _decode_on_demand(pipe: Connection, images: list[bytes]) -> None:
    torch.set_num_threads(1)
    while pipe.recv():
        for image in images:
            image_of(image)
        pipe.send(True)


class Loaded:
    """Whatever a DataLoader reads."""

    loader: Any

    def epoch(self) -> float:
        began = time.perf_counter()
        for batch in self.loader:
            assert batch is not None
        return time.perf_counter() - began


def _opened(sources: Any) -> Any:
    store = s3fs.S3FileSystem()
    for source in sources:
        yield {"url": source["url"], "stream": store.open(source["url"], "rb")}


class _OpenClip:
    """open_clip's own evaluation transform: Pillow to float."""

    def __init__(self) -> None:
        from open_clip.transform import image_transform

        self.transform = image_transform(224, is_train=False, mean=PREPROCESS.mean, std=PREPROCESS.std)

    def __call__(self, sample: dict[str, Any]) -> Any:
        from PIL import Image

        return self.transform(Image.open(io.BytesIO(sample["jpg"]))), int(sample["cls"])


class Obvious(Loaded):
    """webdataset over s3fs with open_clip's transform: what one builds first."""

    def __init__(self, snapshot: Snapshot) -> None:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        urls = [snapshot.shard_uri(number) for number in range(len(snapshot.manifest.shards))]
        pipeline = wds.DataPipeline(
            wds.SimpleShardList(urls),
            wds.split_by_worker,
            _opened,
            tar_file_expander,
            group_by_keys,
            wds.map(_OpenClip()),
            wds.batched(BATCH),
        )
        self.loader = DataLoader(
            pipeline, batch_size=None, num_workers=WORKERS, persistent_workers=True, multiprocessing_context="forkserver"
        )
