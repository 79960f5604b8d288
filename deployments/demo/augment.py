"""The demo's two augmentations, named from its request as `deployments.demo.augment:mild` and `:medium`. No flips: a mirrored 2 is no 2.

Rotation, scale and shift are those of the demo's frozen setting; medium adds pixel noise. The pictures are grey: one channel is moved,
by Pillow because it needs a tenth of a millisecond less than torch on 32 pixels, and stands for all three. Outside the image is black.
"""

import math
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NOISE_UNIT = 0.35 * 255
"""Grey levels in one unit of the demo's normalised input: noise is stated in those units."""


def mild(image_CHW: Tensor, seed: int, size: int) -> Tensor:
    """Up to 6 degrees, 5 % of scale and 6 % of shift."""
    return _colour(_moved(image_CHW, random.Random(seed), size, degrees=6, scale=0.05, shift=0.06))


def medium(image_CHW: Tensor, seed: int, size: int) -> Tensor:
    """Up to 15 degrees, 15 % of scale, 12 % of shift, and Gaussian pixel noise of a standard deviation up to 0.15."""
    rng = random.Random(seed)
    moved_HW = _moved(image_CHW, rng, size, degrees=15, scale=0.15, shift=0.12)
    deviation = rng.uniform(0, 0.15) * NOISE_UNIT
    noise_HW = np.random.Generator(np.random.PCG64(rng.getrandbits(32))).standard_normal(moved_HW.shape, dtype=np.float32) * deviation
    return _colour(np.rint(moved_HW + noise_HW).clip(0, 255).astype(np.uint8))


def _moved(image_CHW: Tensor, rng: random.Random, size: int, *, degrees: float, scale: float, shift: float) -> np.ndarray:
    """The image at `size` under a random similarity about its centre, bilinear: uint8 (size, size)."""
    grey = Image.fromarray(image_CHW[0].numpy()).resize((size, size), Image.Resampling.BILINEAR)
    angle = math.radians(rng.uniform(-degrees, degrees))
    zoom = 1 / rng.uniform(1 - scale, 1 + scale)
    cos, sin, centre = math.cos(angle) * zoom, math.sin(angle) * zoom, size / 2
    right, down = rng.uniform(-shift, shift) * size, rng.uniform(-shift, shift) * size
    places = (cos, -sin, centre - cos * centre + sin * centre + right, sin, cos, centre - sin * centre - cos * centre + down)
    return np.array(grey.transform((size, size), Image.Transform.AFFINE, places, Image.Resampling.BILINEAR))


def _colour(grey_HW: np.ndarray) -> Tensor:
    return torch.from_numpy(grey_HW).expand(3, -1, -1)
