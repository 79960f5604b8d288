"""Bytes to pixels, decided once for training, evaluation and digests.

- JPEG of one or three components, upright and flawless: simplejpeg (libjpeg-turbo; equal to Pillow's to the last bit, at less CPU).
  Everything else, CMYK and turned, huge or damaged JPEG included: Pillow, which also decides whether it can be read. It refuses more than
  179 million pixels, which a file of a few kB can hold.
- EXIF orientation is applied: the label was given to the upright picture.
- Palette becomes RGB; grey is repeated; alpha is dropped, not blended; CMYK is converted by Pillow; 16 bits keep their high byte;
  floating point is refused, for nothing says which number is white.
- Only the first frame of an animation is read.
- Resize runs on uint8 with antialiasing: at most 2 of 255 from Pillow's own resize, which open_clip uses.
"""

import io
import struct

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from stockpot.preparation import Preprocess

LONGEST = 1000
"""Long by short side of a picture that is resized as a whole."""

KINDS = ("empty", "image", "tokens")
"""What is wrong with a sample: it has no bytes, or they are no readable image, or no tokens that the model knows."""


DAMAGED = (
    OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, struct.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise on files that are not what they say."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what makes it upright. (Pillow's `exif_transpose` also writes the EXIF anew, and stumbles over an odd one.)"""


class Undecodable(ValueError):
    """These bytes are not what a sample holds; the message is the reason, `kind` one of `KINDS`."""

    def __init__(self, reason: str, kind: str = "image") -> None:
        super().__init__(reason)
        self.kind = kind


def decode(data: bytes) -> Tensor:
    """An encoded image to uint8 RGB, shape 3HW. Raises `Undecodable` with the reason."""
    if not data:
        raise Undecodable("is empty (0 bytes)", "empty")
    try:
        jpeg = _decode_flawless_jpeg(data) if data[:2] == b"\xff\xd8" else None
        return _decode_with_pillow(data) if jpeg is None else jpeg
    except DAMAGED as error:
        known = not isinstance(error, UnidentifiedImageError)  # whose words are an object's address
        reason = (str(error) or type(error).__name__).splitlines()[0] if known else "unknown format"
        raise Undecodable(f"is not a readable image ({reason}; starts with {data[:8]!r})") from error


def eval_transform(image: Tensor, preprocess: Preprocess) -> Tensor:
    """The evaluation transform: uint8 3HW to uint8 3SS, S = `preprocess.size`."""
    mode = InterpolationMode.BICUBIC if preprocess.interpolation == "bicubic" else InterpolationMode.BILINEAR
    side = preprocess.resized
    if list(image.shape[-2:]) != [side, side]:
        target = [side, side] if preprocess.resize_mode == "squash" else [side]
        image = image if len(target) == 2 else _middle(image)
        image = functional.resize(image, target, interpolation=mode, antialias=True)
    pixels: Tensor = functional.center_crop(image, [preprocess.size] * 2)
    return pixels


def _middle(image: Tensor) -> Tensor:
    """Of a picture that is longer than any, its middle, which is all that a crop shows: a line of 1 by 60,000 would take 9 GB."""
    height, width = image.shape[-2:]
    short = min(height, width)
    spare = max(0, max(height, width) // short - LONGEST) // 2 * short  # whole squares, so that no pixel comes to lie elsewhere
    if not spare:
        return image
    return image[..., spare:-spare] if width > height else image[..., spare:-spare, :]


def _decode_flawless_jpeg(data: bytes) -> Tensor | None:
    """None for any other."""
    components, size, exif = _jpeg_header(data)
    if components not in (1, 3) or size > (Image.MAX_IMAGE_PIXELS or size) or (exif and _is_turned(data)):
        return None
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
    except ValueError:
        return None


def _is_turned(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in TURNS


def _decode_with_pillow(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        upright = image if turn is None else image.transpose(turn)
        if upright.mode == "F":
            raise ValueError("floating point numbers")
        if upright.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255 instead of scaling
            upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
        return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)


def _jpeg_header(data: bytes) -> tuple[int, int, bool]:
    """Colour components and pixels by a JPEG's frame header, 0 when there is none; and whether metadata, such as EXIF, stand before it."""
    at, exif = 2, False
    while at + 10 <= len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            return data[at + 9], height * width, exif
        elif marker in (0x01, *range(0xD0, 0xD8)):
            at += 2
        else:
            exif = exif or marker == 0xE1
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, 0, exif
