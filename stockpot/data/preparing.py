"""Bytes to a model's input: the one place of the data plane that tells images (`images`) from texts (`tokens`)."""

import hashlib
from collections.abc import Callable

import numpy as np
import PIL
import simplejpeg
import torchvision
from numpy.typing import NDArray
from torch import Tensor

from stockpot.data import images, tokens
from stockpot.digests import short
from stockpot.preparation import Preparation, Tokens

DECODING = 1
"""Number of the rules in `images` and `tokens`; part of every transform digest."""

DECODERS = (torchvision.__version__, PIL.__version__, simplejpeg.__version__)
"""Versions of what decodes and resizes: what a node keeps of other ones is made again."""

Augment = Callable[[Tensor, int], Tensor]
"""(what was decoded, seed of this sample in this epoch) to the input: an image to uint8 3SS, tokens to int32 (length,)."""


def decoded(data: bytes, preparation: Preparation) -> Tensor:
    """What an augmentation sees: an image uint8 3HW of any size, or tokens int32 (length,). Raises `Undecodable` with the reason."""
    if isinstance(preparation, Tokens):
        return tokens.fit(tokens.decode(data), preparation)
    return images.decode(data)


def as_evaluated(sample: Tensor, preparation: Preparation) -> Tensor:
    """The evaluation transform of what was decoded."""
    return sample if isinstance(preparation, Tokens) else images.eval_transform(sample, preparation)


def prepare(data: bytes, preparation: Preparation) -> Tensor:
    """The input of one sample, as an evaluation sees it. Raises `Undecodable` with the reason."""
    return as_evaluated(decoded(data, preparation), preparation)


def transform_digest(preparation: Preparation) -> str:
    """Identity of the evaluation transform, decoding included: accuracies with different digests are never compared."""
    return short([preparation, DECODING])


def content_digest(data: bytes) -> bytes:
    """sha256 of what a sample shows, whatever the file format: equal pixels, or equal tokens. Raises `Undecodable` with the reason."""
    if data.startswith(tokens.MAGIC):
        return hashlib.sha256(b"tokens" + tokens.decode(data).tobytes()).digest()
    return pixel_digest(images.decode(data).numpy())


def pixel_digest(pixels_3HW: NDArray[np.uint8]) -> bytes:
    """sha256 of the decoded image and its shape: equal for the same picture in another file format."""
    return hashlib.sha256(repr(pixels_3HW.shape).encode() + np.ascontiguousarray(pixels_3HW).tobytes()).digest()
