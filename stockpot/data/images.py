"""Bytes to pixels, decided once for training, evaluation and digests.

- JPEG of one or three components: torchvision's decoder (libjpeg-turbo; equal to PIL's to the last bit, at less CPU). Everything else,
  CMYK JPEG included: Pillow.
- EXIF orientation is applied: the label was given to the upright picture.
- Palette becomes RGB; grey is repeated; alpha is dropped, not blended; CMYK is converted by Pillow; 16-bit grey keeps its high byte.
- Only the first frame of an animation is read.
- Resize runs on uint8 with antialiasing: at most 2 of 255 from Pillow's own resize, which open_clip uses.
"""

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode, functional

from stockpot.preparation import Preprocess


class Undecodable(ValueError):
    """These bytes are not what a sample holds; the message is the reason."""


def decode(data: bytes) -> Tensor:
    """An encoded image to uint8 RGB, shape 3HW. Raises `Undecodable` with the reason."""
    if not data:
        raise Undecodable("is empty (0 bytes)")
    try:
        if data[:2] == b"\xff\xd8" and _jpeg_components(data) in (1, 3):
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image: Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
            return image
        return _decode_with_pillow(data)
    except (RuntimeError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        known = not isinstance(error, UnidentifiedImageError)  # whose words are an object's address
        reason = (str(error) or type(error).__name__).splitlines()[0].rpartition(".cpp:")[2] if known else "unknown format"
        raise Undecodable(f"is not a readable image ({reason}; starts with {data[:8]!r})") from error


def eval_transform(image: Tensor, preprocess: Preprocess) -> Tensor:
    """The evaluation transform: uint8 3HW to uint8 3SS, S = `preprocess.size`."""
    mode = InterpolationMode.BICUBIC if preprocess.interpolation == "bicubic" else InterpolationMode.BILINEAR
    side = preprocess.resized
    if list(image.shape[-2:]) != [side, side]:
        target = [side, side] if preprocess.resize_mode == "squash" else [side]
        image = functional.resize(image, target, interpolation=mode, antialias=True)
    pixels: Tensor = functional.center_crop(image, [preprocess.size] * 2)
    return pixels


def _decode_with_pillow(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255 instead of scaling
            upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
        return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1).contiguous()


def _jpeg_components(data: bytes) -> int:
    """Colour components of a JPEG by its frame header; 0 when there is none."""
    at = 2
    while at + 10 <= len(data):
        if data[at] != 0xFF:
            return 0
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return data[at + 9]
        elif marker in (0x01, *range(0xD0, 0xD8)):
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0
