"""What is done to a training image. One function per name: (uint8 CHW of any size, seed) to uint8 CHW, `size` by `size`.

The seed alone decides the draw, and every sample and epoch has its own, so neither the order of workers nor a resume changes a pixel.
The names are those of Wortsman et al. 2022, appendix J.2.1: minimal is a crop of 90-100 % of the area, medium is timm's default,
strong is RandAugment (Cubuk et al. 2019, arXiv:1909.13719) with N=2, M=15.
"""

import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as images
from torchvision.transforms.v2.functional import InterpolationMode

from stockpot.config import Preprocess
from stockpot.errors import BadRequest

Augment = Callable[[Tensor, int], Tensor]

TIMM_STRINGS = {"strong": "rand-m15-n2", "medium": None}
"""Names that stand for a timm auto-augment string (None: timm's default transform without one)."""


def augmentation(name: str, preprocess: Preprocess) -> Augment | None:
    """The augmentation of that name, None for `none`.

    `package.module:function` is called as function(image, seed, size). Raises `BadRequest` for a name nothing answers to.
    """
    if name == "none":
        return None
    if name == "minimal":
        return _crop(preprocess, smallest=0.9)
    if ":" in name:
        return _imported(name, preprocess)
    policy = TIMM_STRINGS.get(name, name)
    if policy is not None and policy.split("-")[0] not in {"rand", "augmix", "original", "originalr", "v0", "v0r", "3a"}:
        raise BadRequest(
            f"There is no augmentation `{name}`: write none, minimal, medium, strong, a timm string such as `rand-m9-n2`, "
            "or `package.module:name`."
        )
    return _timm(policy, preprocess)


def _crop(preprocess: Preprocess, *, smallest: float) -> Augment:
    """A crop of `smallest` to all of the area with an aspect between 3/4 and 4/3, resized."""
    interpolation = InterpolationMode(preprocess.interpolation)

    def crop(image_CHW: Tensor, seed: int) -> Tensor:
        rng = random.Random(seed)
        height, width = image_CHW.shape[1:]
        share, aspect = rng.uniform(smallest, 1.0), 2 ** (rng.uniform(-1, 1) * 0.41503749927884376)  # log2(4/3)
        tall = min(height, max(1, round((height * width * share / aspect) ** 0.5)))
        wide = min(width, max(1, round((height * width * share * aspect) ** 0.5)))
        top, left = rng.randint(0, height - tall), rng.randint(0, width - wide)
        cut: Tensor = images.resized_crop(image_CHW, top, left, tall, wide, [preprocess.size] * 2, interpolation, antialias=True)
        return cut

    return crop


def _timm(policy: str | None, preprocess: Preprocess) -> Augment:
    from timm.data import create_transform

    transform = create_transform(
        preprocess.size,
        is_training=True,
        auto_augment=policy,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        normalize=False,
    )

    def augment(image_CHW: Tensor, seed: int) -> Tensor:
        with seeded(seed):
            result: Tensor = transform(images.to_pil_image(image_CHW))
        return result

    return augment


def _imported(name: str, preprocess: Preprocess) -> Augment:
    module, _, attribute = name.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadRequest(f"The augmentation `{name}` cannot be imported ({error}); it must be installed where the trial runs.") from error
    return lambda image_CHW, seed: function(image_CHW, seed, preprocess.size)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """python, numpy and torch draw from this seed inside, and go on where they were after: timm's transforms use all three."""
    python, arrays, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002
        torch.set_rng_state(tensors)
