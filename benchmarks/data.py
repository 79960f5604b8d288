"""The data plane in ratios: training input against the decode limit, the obvious build, litdata and mosaicml-streaming; what cold trials
read; filling the cache against a raw GET; re-reading a held-out split; memory against the number of shards.

A SeaweedFS server on loopback holds the photos. Within a round every reader takes its turn, so that a busy machine slows all of them;
ratios are of one round, the figure is their median, the spread their range. litdata and mosaicml-streaming are measured where they can be
imported; the latter pins older numpy and huggingface-hub, so give it a folder of its own: `pip install --target DIR --no-deps ...` and
`PYTHONPATH=DIR make bench`.
"""

import hashlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _readers
from benchmarks._photos import CLASSES, photos
from stockpot import storage
from stockpot.data.node_cache import NodeCache
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.shards import FETCHED_AT_ONCE, TrainReader, pixels
from stockpot.data.snapshots import Snapshot, open_snapshot
from stockpot.evaluation import normalise
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
        found |= _told(_filling(store, Path(scratch)))
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


def _filling(store: ObjectStore, scratch: Path) -> dict[str, dict[str, Any]]:
    """Twelve objects of 16 MiB: GETs that keep nothing, GETs hashed and stored with nothing of ours, and the node cache."""
    objects = {store.uri("fill", f"{number}.tar"): np.random.default_rng(number).bytes(16 * 2**20) for number in range(12)}
    sha256 = {uri: hashlib.sha256(data).hexdigest() for uri, data in objects.items()}
    for uri, data in objects.items():
        storage.write_bytes(uri, data)
    urls = [client(store).sign(uri) for uri in objects]

    def get(url: str, sink: Callable[[bytes], object] = len) -> None:
        with urllib.request.urlopen(url) as answer:
            while piece := answer.read(2**20):
                sink(piece)

    def get_hash_store(url: str) -> None:
        sha256 = hashlib.sha256()
        with tempfile.TemporaryFile(dir=scratch) as file:
            get(url, lambda piece: (sha256.update(piece), file.write(piece)))
            file.flush()
            os.fsync(file.fileno())

    def fill(uri: str) -> None:
        assert not NodeCache().ensure(uri, sha256[uri], 16 * 2**20).hit

    def round_() -> dict[str, float]:
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool, _cold(scratch):
            return {
                "one": _timed(lambda: [get(url) for url in urls]),
                "get": _timed(lambda: list(pool.map(get, urls))),
                "bound": _timed(lambda: list(pool.map(get_hash_store, urls))),
                "hash": _timed(lambda: [hashlib.sha256(data) for data in objects.values()]),
                "fill": _timed(lambda: list(pool.map(fill, objects))),
            }

    rounds = [round_() for _ in range(ROUNDS + 1)][1:]
    ours = f"the node cache: {FETCHED_AT_ONCE} at once, hashed, synced"
    return {
        "data.cold_fill_vs_get": _figure(rounds, "one", "fill", f"raw HTTP GET, one after another, nothing kept or hashed; ours is {ours}"),
        "data.cold_fill_vs_get_4": _figure(rounds, "get", "fill", f"the same GETs, {FETCHED_AT_ONCE} at once"),
        "data.cold_fill_vs_bound": _figure(rounds, "bound", "fill", f"GET, sha256, write and fsync, {FETCHED_AT_ONCE} at once, no library"),
        "data.sha256_vs_get": _figure(
            rounds, "one", "hash", "raw HTTP GET, one after another; sha256 of the same bytes in memory, one core"
        ),
    }


def _rereading(snapshot: Snapshot, scratch: Path) -> dict[str, dict[str, Any]]:
    """The first pass over a split on a fresh node against every later one, as model input and as it is stored; all on two threads. Beside
    it the pass of whoever keeps no pixels: webdataset over s3fs with open_clip's transform, in two workers."""
    room = torch.empty(16, 3, 224, 224)
    kept = torch.empty(16, 3, 224, 224, dtype=torch.uint8)
    obvious = _readers.Obvious(snapshot)
    obvious.epoch()

    def read(step: Callable[[torch.Tensor], object]) -> None:
        images = pixels(Snapshot(snapshot.uri, snapshot.manifest), "train", _readers.PREPROCESS).images
        for at in range(0, len(images), 16):
            step(torch.from_numpy(np.array(images[at : at + 16])))

    def as_float(batch: torch.Tensor) -> object:
        return normalise(batch, _readers.PREPROCESS, room)

    def as_uint8(batch: torch.Tensor) -> object:
        return kept[: len(batch)].copy_(batch)

    def round_() -> dict[str, float]:
        with _cold(scratch):
            return {"first": _timed(lambda: read(as_float))} | _in_threads(
                _readers.WORKERS, lambda: {"float": _timed(lambda: read(as_float)), "uint8": _timed(lambda: read(as_uint8))}
            )

    rounds = [round_() | {"obvious": obvious.epoch()} for _ in range(ROUNDS)]
    first, anew = (
        "its first pass on a fresh node: fetch, decode, resize, store, normalise",
        "webdataset over s3fs with open_clip's transform",
    )
    return {
        "data.held_out_reread_float": _figure(rounds, "first", "float", first),
        "data.held_out_reread_uint8": _figure(rounds, "first", "uint8", first),
        "data.held_out_reread_float_vs_obvious": _figure(rounds, "obvious", "float", anew),
    }


def _in_threads(count: int, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(1)


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
