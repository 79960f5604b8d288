"""What is done to a training image: (uint8 CHW of any size, seed) to uint8 CHW, `size` by `size`.

The seed alone decides the draw, and every sample and epoch has its own, so neither the order of workers nor a resume changes a pixel.
The names are those of Wortsman et al. 2022, appendix J.2.1: minimal is a crop of 90-100 % of the area, medium is timm's default,
strong is RandAugment (Cubuk et al. 2019, arXiv:1909.13719) with N=2, M=15. All are plain values, so that a loader process can have one.

timm applies an operation of its RandAugment half of the time, and no magnitude above 10, unless a string says `p1` and `mmax`; the names
here say both, as the paper and its reference code do. A string of the user's is taken at its word, and refused where timm would not.
timm's crop of a long image may be below the smallest share of its area; there, and nowhere else, the crop is ours.
"""

import importlib
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as images
from torchvision.transforms.v2.functional import InterpolationMode

from stockpot.errors import BadRequest
from stockpot.preparation import Preparation, Preprocess, Tokens

Augment = Callable[[Tensor, int], Tensor]
Box = tuple[int, int, int, int]
"""Top, left, height and width of a crop, in pixels."""

LOG2_WIDEST = 0.41503749927884376
"""log2(4/3): crops have an aspect between 3:4 and 4:3."""
TRIES = 10
"""How often torchvision draws a crop before it takes a central one."""
TIMM_STRINGS = {"strong": "rand-m15-n2-p1-mmax15", "medium": None}
"""Names that stand for a timm auto-augment string (None: timm's default transform without one)."""
NUMBER = r"\d+(\.\d+)?"
TIMM_SECTIONS = {
    "rand": rf"(m|n|mmax)\d+|(p|mstd){NUMBER}|inc[01]|t(weights|3aw|3a)",
    "augmix": rf"(m|d)\d+|w[1-9]\d*|(a|mstd){NUMBER}|b[01]",
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), f"mstd{NUMBER}"),
}
"""Policies of timm, and what may follow each after a dash (timm.data.auto_augment). timm itself passes over what it cannot read."""


def augmentation(name: str, preprocess: Preparation, *, smallest_crop: float | None = None) -> Augment | None:
    """The augmentation of that name, None for `none`.

    smallest_crop: share of the area; None is 0.9 for minimal and timm's 0.08 for the others. `package.module:function` is called as
    function(image, seed, size) and crops as it likes; for a text, with its tokens and how many they must stay. Raises `BadRequest` for a
    name nothing answers to.
    """
    if name == "none":
        return None
    if ":" in name:
        return Imported(name, preprocess.shape[-1]).found()
    if isinstance(preprocess, Tokens):
        raise BadRequest(f"`{name}` augments images and the model reads tokens; write `augmentation: none`, or `package.module:name`.")
    if name == "minimal":
        return Crop(preprocess, 0.9 if smallest_crop is None else smallest_crop)
    smallest = 0.08 if smallest_crop is None else smallest_crop
    if name == "stochastic":
        return Stochastic(preprocess, smallest)
    policy = TIMM_STRINGS.get(name, name)
    if policy is not None:
        _require_readable(policy)
    return TimmPolicy(preprocess, smallest, policy)


def _require_readable(string: str) -> None:
    """Raises `BadRequest` for a timm string that timm does not know, or would take for another one."""
    policy, *sections = string.split("-")
    if policy not in TIMM_SECTIONS:
        raise BadRequest(
            f"There is no augmentation `{string}`: write none, minimal, medium, strong, stochastic, a timm string such as `rand-m9-n2`, "
            "or `package.module:name`."
        )
    for section in sections:
        if not re.fullmatch(TIMM_SECTIONS[policy], section):
            raise BadRequest(
                f"The augmentation `{string}` has `{section}`, which timm's `{policy}` cannot read; every part is a letter and a number "
                "behind a dash, such as `rand-m9-n2`."
            )
    values = {match[1]: int(match[2]) for match in (re.fullmatch(r"(m|mmax)(\d+)", section) for section in sections) if match}
    magnitude, most = values.get("m", 10), values.get("mmax", 10)
    if policy == "rand" and magnitude > most:
        raise BadRequest(
            f"The augmentation `{string}` has magnitude {magnitude} and timm cuts it down to {most}; write "
            f"`{re.sub(r'-mmax[0-9]+', '', string)}-mmax{magnitude}`."
        )


@dataclass(frozen=True)
class Crop:
    """A crop of `smallest` to all of the area, resized."""

    preprocess: Preprocess
    smallest: float

    def __call__(self, image_CHW: Tensor, seed: int) -> Tensor:
        top, left, tall, wide = self.box(image_CHW.shape[1], image_CHW.shape[2], random.Random(seed))
        size, interpolation = [self.preprocess.size] * 2, InterpolationMode(self.preprocess.interpolation)
        cut: Tensor = images.resized_crop(image_CHW, top, left, tall, wide, size, interpolation, antialias=True)
        return cut

    def box(self, height: int, width: int, rng: random.Random) -> Box:
        """A crop by torchvision's rule for RandomResizedCrop: an area and an aspect are drawn until they fit into the image; where they do
        not, a central crop. Unlike torchvision's, none is ever below the share: a long image's central crop is longer than the widest
        aspect, if need be."""
        least = self.smallest * height * width
        for _ in range(TRIES):
            area, aspect = height * width * rng.uniform(self.smallest, 1.0), 2 ** rng.uniform(-LOG2_WIDEST, LOG2_WIDEST)
            tall, wide = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
            if tall <= height and wide <= width and tall * wide >= least:
                return rng.randint(0, height - tall), rng.randint(0, width - wide), tall, wide
        tall = min(height, max(round(width * 4 / 3), math.ceil(least / width)))
        wide = min(width, max(round(height * 4 / 3), math.ceil(least / height)))
        return (height - tall) // 2, (width - wide) // 2, tall, wide


@dataclass(frozen=True)
class TimmPolicy:
    """timm's training transform: random crop, flip, and colour jitter or an auto-augment policy."""

    preprocess: Preprocess
    smallest: float
    policy: str | None

    @cached_property
    def _transform(self) -> Any:
        from timm.data import create_transform

        made = create_transform(
            self.preprocess.size,
            is_training=True,
            scale=(self.smallest, 1.0),
            auto_augment=self.policy,
            interpolation=self.preprocess.interpolation,
            mean=self.preprocess.mean,
            normalize=False,
        )
        crop = made.transforms[0]
        crop.get_params = partial(self._box, crop.get_params)
        for step in made.transforms:
            for op in getattr(step, "ops", None) or chain.from_iterable(getattr(step, "policy", ())):
                if op.name.startswith("Posterize"):
                    op.aug_fn = _posterize
        return made

    def _box(self, timms: Callable[..., Box], picture: Image.Image, scale: object, ratio: object) -> Box:
        """timm's crop, where it keeps the share."""
        box, height, width = timms(picture, scale, ratio), picture.height, picture.width
        if box[2] * box[3] >= self.smallest * height * width:
            return box
        return Crop(self.preprocess, self.smallest).box(height, width, random.Random(random.getrandbits(63)))

    def __call__(self, image_CHW: Tensor, seed: int) -> Tensor:
        with seeded(seed):
            result: Tensor = self._transform(images.to_pil_image(image_CHW))
        return result


def _posterize(picture: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm asks for no bit at all at magnitudes 0 to 2, or from 10 on where they increase: a black picture once, an error since Pillow
    13. One bit is kept, as RandAugment's other ports do."""
    return picture if bits >= 8 else ImageOps.posterize(picture, max(1, bits))


@dataclass(frozen=True)
class Stochastic:
    """RandAugment with a magnitude of 0 to 20 and 0 to 2 operations, drawn for every image."""

    preprocess: Preprocess
    smallest: float

    @cached_property
    def _levels(self) -> dict[tuple[int, int], TimmPolicy]:
        levels = [(magnitude, operations) for magnitude in range(21) for operations in range(3)]
        return {(m, n): TimmPolicy(self.preprocess, self.smallest, f"rand-m{m}-n{n}-p1-mmax20") for m, n in levels}

    def __call__(self, image_CHW: Tensor, seed: int) -> Tensor:
        rng = random.Random(seed)
        return self._levels[rng.randrange(21), rng.randrange(3)](image_CHW, rng.getrandbits(63))


@dataclass(frozen=True)
class Imported:
    """A function of the user's own, by name."""

    name: str
    size: int

    def found(self) -> "Imported":
        """This one, after a look whether it can be imported."""
        try:
            function = self._function
        except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError: a name that begins with a dot
            raise BadRequest(
                f"The augmentation `{self.name}` cannot be imported ({error}); it must be installed where the trial runs."
            ) from error
        if not callable(function):
            raise BadRequest(f"The augmentation `{self.name}` is a value of type {type(function).__name__}; name a function.")
        return self

    @property
    def _function(self) -> Any:
        module, _, attribute = self.name.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __call__(self, image_CHW: Tensor, seed: int) -> Tensor:
        result: Tensor = self._function(image_CHW, seed, self.size)
        return result


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
