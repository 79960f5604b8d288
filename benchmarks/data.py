"""The data plane in ratios: training input against the decode limit, the obvious build, litdata and mosaicml-streaming; what cold trials
read; filling the cache against a raw GET; re-reading a held-out split; memory against the number of shards.

A SeaweedFS server on loopback holds the photos. Within a round every reader takes its turn, so that a busy machine slows all of them;
ratios are of one round, the figure is their median, the spread their range. litdata and mosaicml-streaming are measured where they can be
imported; the latter pins older numpy and huggingface-hub, so give it a folder of its own: `pip install --target DIR --no-deps ...` and
`PYTHONPATH=DIR make bench`.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _readers
from benchmarks._photos import CLASSES, photos
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.shards import TrainReader, pixels
from stockpot.data.snapshots import Snapshot, open_snapshot
from tests.faulty_proxy import FaultyProxy, faulty_proxy
from tests.object_store import ObjectStore, client, object_store

PHOTOS, ROUNDS = 1200, 5
SHARD_BYTES = 6 * 2**20


def measure() -> dict[str, dict[str, Any]]:
    """Every figure by its name in the bench file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as scratch, object_store(Path(scratch) / "store") as store:
        os.environ.update(store.environ, XDG_CACHE_HOME=f"{scratch}/cache")
        given = list(photos(PHOTOS))
        pinned = publish(store.uri("photos"), "photos", CLASSES, GivenSamples(given), splits="train", shard_bytes=SHARD_BYTES)
        snapshot = open_snapshot(pinned)
        print(f"{PHOTOS} photos in {len(snapshot.manifest.shards)} shards, {_bytes(snapshot) / 1e6:.0f} MB", file=sys.stderr)
        found = _told(_reading(snapshot, [photo.image for photo in given], Path(scratch)))
        found |= _told(_filling(snapshot, store, Path(scratch)))
        found |= _told(_rereading(snapshot, Path(scratch)))
        found |= _told(_cold_trials(snapshot, store, Path(scratch)))
    return found | _told(_memory())


def _told(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Say each part when it is done: the whole takes minutes."""
    for name, figure in figures.items():
        print(f"{name} {figure['ratio']:.3g} {figure['spread']}", file=sys.stderr, flush=True)
    return figures


def _reading(snapshot: Snapshot, images: list[bytes], scratch: Path) -> dict[str, dict[str, Any]]:
    readers: dict[str, _readers.Reader | None] = {
        "limit": _readers.Limit(images),
        "ours": _readers.Ours(snapshot, "train"),
        "obvious": _readers.Obvious(snapshot),
        "litdata": _readers.litdata_reader(scratch / "litdata", len(images)),
        "mosaic": _readers.mosaic_reader(scratch / "mosaic", len(images)),
    }
    there = {name: reader for name, reader in readers.items() if reader}
    for reader in there.values():
        reader.epoch()
    rounds = [{name: reader.epoch() for name, reader in there.items()} for _ in range(ROUNDS)]
    found = {
        "data.warm_vs_decode_limit": _figure(rounds, "limit", "ours", "pure decode and resize of bytes in memory, 2 processes"),
        "data.warm_vs_obvious": _figure(rounds, "obvious", "ours", "webdataset over s3fs with open_clip's transform"),
    }
    for name, peer in (("litdata", "litdata, local chunks"), ("mosaic", "mosaicml-streaming, local shards")):
        if name in there:
            found[f"data.warm_vs_{name}"] = _figure(rounds, name, "ours", peer)
            found[f"data.{name}_vs_decode_limit"] = _figure(rounds, "limit", name, "the same limit, for comparison")
    return found


def _filling(snapshot: Snapshot, store: ObjectStore, scratch: Path) -> dict[str, dict[str, Any]]:
    plain = client(store)
    urls = [plain.sign(snapshot.shard_uri(number)) for number in range(len(snapshot.manifest.shards))]

    def get() -> None:
        for url in urls:
            with urllib.request.urlopen(url) as answer:
                while answer.read(2**20):
                    pass

    def fill() -> None:
        with _cold(scratch):
            for number in range(len(urls)):
                assert not snapshot.fetch_shard(number).hit

    rounds = [{"get": _timed(get), "fill": _timed(fill)} for _ in range(ROUNDS + 1)][1:]
    return {"data.cold_fill_vs_get": _figure(rounds, "get", "fill", "raw HTTP GET of the same objects, nothing stored or hashed")}


def _rereading(snapshot: Snapshot, scratch: Path) -> dict[str, dict[str, Any]]:
    mean = torch.tensor(_readers.PREPROCESS.mean).view(1, 3, 1, 1)
    std = torch.tensor(_readers.PREPROCESS.std).view(1, 3, 1, 1)
    room = torch.empty(_readers.BATCH, 3, 224, 224, dtype=torch.uint8)

    def read(step: Callable[[torch.Tensor], object]) -> None:
        images = pixels(snapshot, "train", _readers.PREPROCESS).images
        for at in range(0, len(images), _readers.BATCH):
            step(torch.from_numpy(np.asarray(images[at : at + _readers.BATCH])))

    def as_float(batch: torch.Tensor) -> object:
        return batch.float().div_(255).sub_(mean).div_(std)

    def as_uint8(batch: torch.Tensor) -> object:
        return room[: len(batch)].copy_(batch)

    rounds = []
    for _ in range(ROUNDS):
        with _cold(scratch):
            first = _timed(lambda: read(as_float))
            rounds.append({"first": first, "float": _timed(lambda: read(as_float)), "uint8": _timed(lambda: read(as_uint8))})
    first = "our own first pass: fetch, decode, resize, store, then read as float"
    return {
        "data.held_out_reread_float": _figure(rounds, "first", "float", first),
        "data.held_out_reread_uint8": _figure(rounds, "first", "uint8", first),
    }


def _cold_trials(snapshot: Snapshot, store: ObjectStore, scratch: Path) -> dict[str, dict[str, Any]]:
    found = {}
    with faulty_proxy(store.port) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        for name, cuts in (("data.cold_bytes_n8", 0), ("data.cold_bytes_n8_faults", -(-len(snapshot.manifest.shards) // 5))):
            ratios = [_read_by_eight(snapshot, proxy, cuts, scratch) for _ in range(3)]
            found[name] = {
                "ratio": statistics.median(ratios), "unit": "bytes from storage / bytes of the dataset",
                "peer": f"one download of every shard; {cuts} cuts in {len(snapshot.manifest.shards)} shards", "repeats": 3,
                "spread": [min(ratios), max(ratios)],
            }  # fmt: skip
        os.environ["AWS_ENDPOINT_URL"] = store.endpoint
    return found


def _read_by_eight(snapshot: Snapshot, proxy: FaultyProxy, cuts: int, scratch: Path) -> float:
    context = multiprocessing.get_context("forkserver")
    with _cold(scratch):
        proxy.break_next("cut", times=cuts, after=min(shard.size for shard in snapshot.manifest.shards) // 2)
        proxy.answered = 0
        trials = [context.Process(target=_trial, args=(dict(os.environ), snapshot.uri, snapshot.digest, seed)) for seed in range(8)]
        for trial in trials:
            trial.start()
        for trial in trials:
            trial.join()
        assert all(trial.exitcode == 0 for trial in trials)
        assert proxy.broken == cuts
    return proxy.answered / _bytes(snapshot)


def _trial(environ: dict[str, str], uri: str, digest: str, seed: int) -> None:
    from stockpot.config import PinnedSnapshot

    os.environ.update(environ)  # the server that forks keeps the environment it was started with
    torch.set_num_threads(1)
    snapshot = open_snapshot(PinnedSnapshot(uri=uri, digest=digest))
    reader = TrainReader(snapshot, preprocess=_readers.PREPROCESS, augment=_small, batch_size=64, seed=seed, reading="cached")
    assert sum(len(batch.labels) for batch in reader.batches(0)) == snapshot.counts["train"]


def _small(image: torch.Tensor, seed: int) -> torch.Tensor:
    del seed
    return image[:, :32, :32]


def _memory() -> dict[str, dict[str, Any]]:
    """Peak memory of a reader over 10,000 samples in 10,000 shards against the same samples in 10."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-", dir=base) as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        picture = next(photos(1)).image
        peaks = {}
        for shards in (10, 10_000):
            given = GivenSamples(Sample(f"s{number:05d}", picture, number % 2, "jpg") for number in range(10_000))
            size = 10_000 // shards * (len(picture) + 1536) - 1024
            pinned = publish(f"{scratch}/{shards}", "many", CLASSES, given, splits="train", shard_bytes=size)
            assert len(open_snapshot(pinned).manifest.shards) == shards
            context = multiprocessing.get_context("forkserver")
            ours, theirs = context.Pipe()
            process = context.Process(target=_peak, args=(theirs, dict(os.environ), pinned.uri, pinned.digest))
            process.start()
            peaks[shards] = ours.recv()
            process.join()
    grown = peaks[10_000] - peaks[10]
    return {
        "data.reader_memory_shards": {
            "ratio": peaks[10_000] / peaks[10], "unit": f"peak memory of a reader ({peaks[10] / 2**20:.0f} MiB, {grown / 2**20:+.0f} MiB)",
            "peer": "the same 10,000 samples in 10 shards instead of 10,000", "repeats": 1, "spread": None,
        }
    }  # fmt: skip


def _peak(pipe: Any, environ: dict[str, str], uri: str, digest: str) -> None:
    import resource

    from stockpot.config import PinnedSnapshot

    os.environ.update(environ)
    torch.set_num_threads(1)
    snapshot = open_snapshot(PinnedSnapshot(uri=uri, digest=digest))
    reader = TrainReader(snapshot, preprocess=_readers.PREPROCESS, augment=_small, batch_size=64, seed=0, reading="cached")
    for number, _ in enumerate(reader.batches(0)):
        if number == 20:
            break
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _figure(rounds: list[dict[str, float]], peer: str, ours: str, words: str) -> dict[str, Any]:
    """How many times as fast as the peer, round by round."""
    ratios = [one[peer] / one[ours] for one in rounds]
    return {
        "ratio": statistics.median(ratios),
        "unit": "times its speed",
        "peer": words,
        "repeats": len(ratios),
        "spread": [min(ratios), max(ratios)],
    }


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@contextmanager
def _cold(scratch: Path) -> Iterator[None]:
    """An empty node cache of its own, removed at the end."""
    before = os.environ["XDG_CACHE_HOME"]
    with tempfile.TemporaryDirectory(dir=scratch) as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        try:
            yield
        finally:
            os.environ["XDG_CACHE_HOME"] = before


def _bytes(snapshot: Snapshot) -> int:
    return sum(shard.size for shard in snapshot.manifest.shards)
