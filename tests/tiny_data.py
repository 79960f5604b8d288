"""Tiny real datasets for tests: noise PNGs of a few kB, which do not compress, packed into small shards."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from stockpot.config import PinnedSnapshot
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.splits import SplitSpec
from stockpot.preparation import Preprocess

CLASSES = ("ant", "bee", "cat")
PREPROCESS = Preprocess(size=16, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", resize_mode="squash")


def picture(seed: int, side: int = 24, kind: str = "png") -> bytes:
    """An encoded picture of noise, one per seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def samples(count: int, start: int = 0, side: int = 24) -> Iterator[Sample]:
    """Samples of three classes in turn."""
    for number in range(start, start + count):
        yield Sample(f"s{number:05d}", picture(number, side), number % len(CLASSES))


def publish_tiny(
    root: str, count: int = 120, *, shard_bytes: int = 30_000, splits: SplitSpec | str | None = None, side: int = 24
) -> PinnedSnapshot:
    """A snapshot of `count` samples; by default a fifth each is held_out and gate."""
    chosen = splits or SplitSpec(held_out=0.2, gate=0.2)
    return publish(root, "tiny", CLASSES, GivenSamples(samples(count, side=side)), splits=chosen, shard_bytes=shard_bytes)
