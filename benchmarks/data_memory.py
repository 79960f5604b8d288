"""Peak memory in ratios: of a reader against the number of shards, of a publication against the number of samples."""

import multiprocessing
import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import _readers
from benchmarks._photos import CLASSES, photos
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.shards import TrainReader
from stockpot.data.snapshots import open_snapshot, pin


def measure() -> dict[str, dict[str, Any]]:
    """Figures by their names in the bench file."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-", dir=base) as scratch:
        reader = {shards: _peak(_read, f"{scratch}/{shards}", _published(f"{scratch}/{shards}", shards)) for shards in (10, 10_000)}
        publisher = {samples: _peak(_publish, f"{scratch}/p{samples}", samples) for samples in (1_000, 10_000)}
    return {
        "data.reader_memory_shards": _figure(reader, "reader", "the same 10,000 samples in 10 shards instead of 10,000"),
        "data.publishing_memory_samples": _figure(publisher, "publication", "1,000 samples instead of 10,000"),
    }


def _figure(peaks: dict[int, int], what: str, peer: str) -> dict[str, Any]:
    """`peaks`: bytes of the small case, then of the large one."""
    small, large = peaks.values()
    unit = f"peak memory of a {what} ({small / 2**20:.0f} MiB, {(large - small) / 2**20:+.0f} MiB)"
    return {"ratio": large / small, "unit": unit, "peer": peer, "repeats": 1, "spread": None}


def _peak(run: Callable[[str, int], None], folder: str, number: int) -> int:
    """Highest resident bytes of a process of its own that calls `run(folder, number)`."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_report_peak, args=(theirs, run, folder, number))
    process.start()
    peak = int(ours.recv())
    process.join()
    return peak


def _report_peak(pipe: Any, run: Callable[[str, int], None], folder: str, number: int) -> None:
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    run(folder, number)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _published(folder: str, shards: int) -> int:
    """10,000 copies of a photo in so many shards."""
    picture = next(photos(1)).data
    given = GivenSamples(Sample(f"s{number:05d}", picture, number % 2, "jpg") for number in range(10_000))
    in_tar = 3 * 512 + -(-len(picture) // 512) * 512  # two headers, the label and the picture in whole blocks
    shard_bytes = 10_000 // shards * in_tar - 1024
    pinned = publish(folder, "many", CLASSES, given, splits="train", shard_bytes=shard_bytes)
    assert len(open_snapshot(pinned).manifest.shards) == shards
    return shards


def _read(folder: str, shards: int) -> None:
    snapshot = open_snapshot(pin(folder))
    assert len(snapshot.manifest.shards) == shards
    reader = TrainReader(snapshot, preprocess=_readers.PREPROCESS, augment=_small, batch_size=64, seed=0, reading="cached")
    for number, _ in enumerate(reader.batches(0)):
        if number == 20:
            break


def _publish(folder: str, samples: int) -> None:
    picture = next(photos(1)).data
    given = GivenSamples(Sample(f"s{number:06d}", picture, number % 2, "jpg") for number in range(samples))
    publish(folder, "some", CLASSES, given, splits="train", shard_bytes=2**24)


def _small(image: torch.Tensor, seed: int) -> torch.Tensor:
    del seed
    return image[:, :32, :32]
