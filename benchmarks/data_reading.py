"""Reading in ratios: warm training input against the decode limit, the obvious build, litdata and mosaicml-streaming (`_peers` says how to
get those two), and every later pass over a held-out split against its first.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _readers
from benchmarks._measuring import ROUNDS, figure, fresh_node, stocked, timed
from benchmarks._peers import Peer
from stockpot.data.shards import pixels
from stockpot.data.snapshots import Snapshot
from stockpot.evaluation import normalise


def measure() -> dict[str, dict[str, Any]]:
    """Figures by their names in the bench file."""
    with stocked(1200) as ground:
        return _reading(ground.snapshot, [photo.data for photo in ground.photos]) | _rereading(ground.snapshot, ground.scratch)


def _reading(snapshot: Snapshot, images: list[bytes]) -> dict[str, dict[str, Any]]:
    peers = {name: Peer(name, len(images)) for name in ("litdata", "streaming")}
    readers: dict[str, _readers.Reader] = {
        "limit": _readers.Limit(images),
        "ours": _readers.Ours(snapshot, "train"),
        "obvious": _readers.Obvious(snapshot),
    } | {name: peer for name, peer in peers.items() if peer.there}
    for reader in readers.values():
        reader.epoch()
    rounds = [{name: reader.epoch() for name, reader in readers.items()} for _ in range(ROUNDS)]
    found = {
        "data.warm_vs_decode_limit": figure(rounds, "limit", "ours", "pure decode and resize of bytes in memory, 2 processes"),
        "data.warm_vs_obvious": figure(rounds, "obvious", "ours", "webdataset over s3fs with open_clip's transform"),
    }
    for name, words in (("litdata", "litdata, local chunks"), ("streaming", "mosaicml-streaming, local shards")):
        if name in readers:
            found[f"data.warm_vs_{name}"] = figure(rounds, name, "ours", words)
            found[f"data.{name}_vs_decode_limit"] = figure(rounds, "limit", name, f"the same limit, for {words}")
    for peer in peers.values():
        peer.close()
    return found


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
        with fresh_node(scratch):
            return {"first": timed(lambda: read(as_float))} | _in_threads(
                _readers.WORKERS, lambda: {"float": timed(lambda: read(as_float)), "uint8": timed(lambda: read(as_uint8))}
            )

    rounds = [round_() | {"obvious": obvious.epoch()} for _ in range(ROUNDS)]
    first, anew = (
        "its first pass on a fresh node: fetch, decode, resize, store, normalise",
        "webdataset over s3fs with open_clip's transform",
    )
    return {
        "data.held_out_reread_float": figure(rounds, "first", "float", first),
        "data.held_out_reread_uint8": figure(rounds, "first", "uint8", first),
        "data.held_out_reread_float_vs_obvious": figure(rounds, "obvious", "float", anew),
    }


def _in_threads(count: int, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(1)
