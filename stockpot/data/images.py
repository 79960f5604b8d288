"""Bytes to pixels, decided once for training, evaluation and digests.

- JPEG of one or three components, upright and flawless: simplejpeg (libjpeg-turbo; equal to Pillow's to the last bit, at less CPU).
  Everything else, CMYK and turned or damaged JPEG included: Pillow, which also decides whether it can be read.
- EXIF orientation is applied: the label was given to the upright picture.
- Palette becomes RGB; grey is repeated; alpha is dropped, not blended; CMYK is converted by Pillow; 16-bit grey keeps its high byte.
- Only the first frame of an animation is read.
- Resize runs on uint8 with antialiasing: at most 2 of 255 from Pillow's own resize, which open_clip uses.
"""

import io

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from stockpot.preparation import Preprocess


class Undecodable(ValueError):
    """These bytes are not what a sample holds; the message is the reason."""


def decode(data: bytes) -> Tensor:
    """An encoded image to uint8 RGB, shape 3HW. Raises `Undecodable` with the reason."""
    if not data:
        raise Undecodable("is empty (0 bytes)")
    try:
        jpeg = _decode_flawless_jpeg(data) if data[:2] == b"\xff\xd8" else None
        return _decode_with_pillow(data) if jpeg is None else jpeg
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        known = not isinstance(error, UnidentifiedImageError)  # whose words are an object's address
        reason = (str(error) or type(error).__name__).splitlines()[0] if known else "unknown format"
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


def _decode_flawless_jpeg(data: bytes) -> Tensor | None:
    """None for any other."""
    components, exif = _jpeg_header(data)
    if components not in (1, 3) or (exif and _is_turned(data)):
        return None
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
    except ValueError:
        return None


def _is_turned(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return bool(image.getexif().get(ExifTags.Base.Orientation, 1) != 1)


def _decode_with_pillow(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255 instead of scaling
            upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
        return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)


def _jpeg_header(data: bytes) -> tuple[int, bool]:
    """Colour components by a JPEG's frame header, 0 when there is none; and whether metadata, such as EXIF, stand before it."""
    at, exif = 2, False
    while at + 10 <= len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return data[at + 9], exif
        elif marker in (0x01, *range(0xD0, 0xD8)):
            at += 2
        else:
            exif = exif or marker == 0xE1
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, exif
