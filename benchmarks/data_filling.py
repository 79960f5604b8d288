"""Filling a node's cache in ratios: against raw GETs of the same objects, and what eight cold trials of a node read from storage."""

import hashlib
import multiprocessing
import os
import statistics
import tempfile
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _readers
from benchmarks._measuring import ROUNDS, figure, fresh_node, size, stocked, timed
from stockpot import storage
from stockpot.config import PinnedSnapshot
from stockpot.data.node_cache import NodeCache
from stockpot.data.shards import FETCHED_AT_ONCE, TrainReader
from stockpot.data.snapshots import Snapshot, open_snapshot
from tests.faulty_proxy import FaultyProxy, faulty_proxy
from tests.object_store import ObjectStore, client


def measure() -> dict[str, dict[str, Any]]:
    """Figures by their names in the bench file."""
    with stocked(600) as ground:
        return _filling(ground.store, ground.scratch) | _cold_trials(ground.snapshot, ground.store, ground.scratch)


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

    def get_store(url: str, *also: Callable[[bytes], object]) -> None:
        with tempfile.TemporaryFile(dir=scratch) as file:
            get(url, lambda piece: [sink(piece) for sink in (file.write, *also)])
            file.flush()
            os.fsync(file.fileno())

    def get_hash_store(url: str) -> None:
        get_store(url, hashlib.sha256().update)

    def fill(uri: str) -> None:
        assert not NodeCache().ensure(uri, sha256[uri], 16 * 2**20).hit

    def round_() -> dict[str, float]:
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool, fresh_node(scratch):
            return {
                "one": timed(lambda: [get(url) for url in urls]),
                "get": timed(lambda: list(pool.map(get, urls))),
                "stored": timed(lambda: list(pool.map(get_store, urls))),
                "bound": timed(lambda: list(pool.map(get_hash_store, urls))),
                "hash": timed(lambda: [hashlib.sha256(data) for data in objects.values()]),
                "fill": timed(lambda: list(pool.map(fill, objects))),
            }

    rounds = [round_() for _ in range(ROUNDS + 1)][1:]
    ours = f"the node cache: {FETCHED_AT_ONCE} at once, hashed, synced"
    return {
        "data.cold_fill_vs_get": figure(rounds, "one", "fill", f"raw HTTP GET, one after another, nothing kept or hashed; ours is {ours}"),
        "data.cold_fill_vs_get_4": figure(rounds, "get", "fill", f"the same GETs, {FETCHED_AT_ONCE} at once"),
        "data.cold_fill_vs_bound": figure(rounds, "bound", "fill", f"GET, sha256, write and fsync, {FETCHED_AT_ONCE} at once, no library"),
        "data.synced_get_vs_get": figure(
            rounds,
            "one",
            "stored",
            f"raw HTTP GET, one after another; the same written and synced, nothing hashed, {FETCHED_AT_ONCE} at once",
        ),
        "data.sha256_vs_get": figure(
            rounds, "one", "hash", "raw HTTP GET, one after another; sha256 of the same bytes in memory, one core"
        ),
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
    context.set_forkserver_preload(["stockpot.data.shards"])  # eight cold caches are measured, not eight cold interpreters
    with fresh_node(scratch):
        proxy.break_next("cut", times=cuts, after=min(shard.size for shard in snapshot.manifest.shards) // 2)
        proxy.answered = 0
        trials = [context.Process(target=_trial, args=(dict(os.environ), snapshot.uri, snapshot.digest, seed)) for seed in range(8)]
        for trial in trials:
            trial.start()
        for trial in trials:
            trial.join()
        assert all(trial.exitcode == 0 for trial in trials)
        assert proxy.broken == cuts
    return proxy.answered / size(snapshot)


def _trial(environ: dict[str, str], uri: str, digest: str, seed: int) -> None:
    os.environ.update(environ)  # the server that forks keeps the environment it was started with
    torch.set_num_threads(1)
    snapshot = open_snapshot(PinnedSnapshot(uri=uri, digest=digest))
    reader = TrainReader(snapshot, preprocess=_readers.PREPROCESS, augment=_small, batch_size=64, seed=seed, reading="cached")
    assert sum(len(batch.labels) for batch in reader.batches(0)) == snapshot.counts["train"]


def _small(image: torch.Tensor, seed: int) -> torch.Tensor:
    del seed
    return image[:, :32, :32]
