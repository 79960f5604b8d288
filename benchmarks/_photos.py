"""Photo-like JPEGs: random crops of scikit-learn's two sample photos plus sensor noise, 256 to 512 px, quality 90, some 40 kB each."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from stockpot.data.publishing import Sample

CLASSES = ("china", "flower")


def photos(count: int, seed: int = 0) -> Iterator[Sample]:
    """The same photos for the same seed."""
    rng = np.random.default_rng(seed)
    sources = load_sample_images().images
    for number in range(count):
        label = number % 2
        height, width = sources[label].shape[:2]
        side_y, side_x = rng.integers(256, 1 + min(height, 512)), rng.integers(256, 513)
        top, left = rng.integers(0, height - side_y + 1), rng.integers(0, width - side_x + 1)
        crop = sources[label][top : top + side_y, left : left + side_x].astype(np.float32)
        noisy = (crop + rng.normal(0, 6, crop.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "jpeg", quality=90)
        yield Sample(f"photo-{number:06d}", file.getvalue(), label, "jpg")
