"""What the data benchmarks share: photos on a real S3 server, a fresh node, and ratios of one round.

Within a round every reader takes its turn, so that a busy machine slows all of them; ratios are of one round, the figure is their median,
the spread their range.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks._photos import CLASSES, photos
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.snapshots import Snapshot, open_snapshot
from tests.object_store import ObjectStore, object_store

ROUNDS = 5
SHARD_BYTES = 6 * 2**20


class Stocked(NamedTuple):
    """Photos, published on a server on loopback that the environment names, with an empty node cache."""

    store: ObjectStore
    snapshot: Snapshot
    photos: list[Sample]
    scratch: Path


@contextmanager
def stocked(count: int) -> Iterator[Stocked]:
    """So many photos, all train; everything is removed at the end."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as scratch, object_store(Path(scratch) / "store") as store:
        os.environ.update(store.environ, XDG_CACHE_HOME=f"{scratch}/cache")
        given = list(photos(count))
        pinned = publish(store.uri("photos"), "photos", CLASSES, GivenSamples(given), splits="train", shard_bytes=SHARD_BYTES)
        snapshot = open_snapshot(pinned)
        print(f"{count} photos in {len(snapshot.manifest.shards)} shards, {size(snapshot) / 1e6:.0f} MB", file=sys.stderr)
        yield Stocked(store, snapshot, given, Path(scratch))


def figure(rounds: list[dict[str, float]], peer: str, ours: str, words: str) -> dict[str, Any]:
    """How many times as fast as the peer, round by round."""
    ratios = [one[peer] / one[ours] for one in rounds]
    return {
        "ratio": statistics.median(ratios),
        "unit": "times its speed",
        "peer": words,
        "repeats": len(ratios),
        "spread": [min(ratios), max(ratios)],
    }


def timed(run: Callable[[], object]) -> float:
    """Seconds a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@contextmanager
def fresh_node(scratch: Path) -> Iterator[None]:
    """An empty node cache of its own, removed at the end."""
    before = os.environ["XDG_CACHE_HOME"]
    with tempfile.TemporaryDirectory(dir=scratch) as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        try:
            yield
        finally:
            os.environ["XDG_CACHE_HOME"] = before


def size(snapshot: Snapshot) -> int:
    """Bytes of all shards."""
    return sum(shard.size for shard in snapshot.manifest.shards)
