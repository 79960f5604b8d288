"""Decoding is decided once: every mode of every format gives the documented RGB, and what is no image says why."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

from stockpot.data.images import Undecodable, decode, eval_transform
from stockpot.data.preparing import transform_digest
from stockpot.preparation import Preprocess

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(RNG.integers(0, 256, (5, 7, 3), np.uint8)).resize((56, 40), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def hwc(data: bytes) -> np.ndarray:
    return decode(data).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}])
def test_jpeg_equals_pillow_to_the_last_bit(options: dict[str, object]) -> None:
    data = encoded(Image.fromarray(SMOOTH), "jpeg", **options)
    assert np.array_equal(hwc(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@given(data=st.data(), side=st.tuples(st.integers(1, 70), st.integers(1, 70)), grey=st.booleans())
@settings(max_examples=60)
def test_any_jpeg_whole_cut_or_corrupt_is_what_pillow_makes_of_it(data: st.DataObject, side: tuple[int, int], grey: bool) -> None:
    options = data.draw(
        st.fixed_dictionaries(
            {"quality": st.integers(1, 100), "subsampling": st.sampled_from([0, 1, 2]), "progressive": st.booleans()},
            optional={"restart_marker_blocks": st.integers(1, 4), "comment": st.just(b"a word")},
        )
    )
    image = Image.fromarray(np.resize(SMOOTH, (*side, 3)))
    jpeg = bytearray(encoded(image.convert("L") if grey else image, "jpeg", **options))
    if data.draw(st.booleans()):
        jpeg[data.draw(st.integers(2, len(jpeg) - 1))] ^= data.draw(st.integers(1, 255))
    jpeg = jpeg[: data.draw(st.sampled_from([len(jpeg), len(jpeg) - 2, len(jpeg) // 2]))]
    try:
        expected = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    except (OSError, SyntaxError):
        with pytest.raises(Undecodable):
            decode(bytes(jpeg))
    else:
        assert np.array_equal(hwc(bytes(jpeg)), expected)


def test_grey_is_repeated() -> None:
    grey = Image.fromarray(SMOOTH[..., 0])
    for kind in ("png", "jpeg"):
        pixels = hwc(encoded(grey, kind))
        assert pixels.shape == (40, 56, 3)
        assert (pixels[..., 0] == pixels[..., 2]).all()


def test_a_palette_becomes_its_colours() -> None:
    palette = Image.fromarray(SMOOTH).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(hwc(encoded(palette, "png")), np.asarray(palette.convert("RGB")))


def test_alpha_is_dropped_not_blended() -> None:
    alpha = RNG.integers(0, 256, (40, 56, 1), np.uint8)
    assert np.array_equal(hwc(encoded(Image.fromarray(np.concatenate([SMOOTH, alpha], 2)), "png")), SMOOTH)


def test_sixteen_bits_keep_their_high_byte() -> None:
    deep = (SMOOTH[..., 0].astype(np.uint16) << 8) | 77
    for kind in ("png", "tiff"):
        assert np.array_equal(hwc(encoded(Image.fromarray(deep), kind))[..., 1], SMOOTH[..., 0])


def test_a_jpeg_of_more_pixels_than_memory_is_refused_as_pillow_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(SMOOTH), "jpeg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 56 // 2 - 1)
    with pytest.raises(Undecodable, match="decompression bomb"):
        decode(data)


def test_floating_point_is_refused_for_nothing_says_what_is_white() -> None:
    with pytest.raises(Undecodable, match="floating point"):
        decode(encoded(Image.fromarray(SMOOTH[..., 0].astype(np.float32) / 255), "tiff"))


def test_cmyk_is_converted_by_pillow() -> None:
    data = encoded(Image.fromarray(SMOOTH).convert("CMYK"), "jpeg")
    assert np.array_equal(hwc(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(SMOOTH), kind, exif=exif)
    assert hwc(data).shape[:2] == ((56, 40) if orientation in (5, 6, 7, 8) else (40, 56))
    assert np.array_equal(hwc(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))


def test_a_turned_picture_is_read_whatever_else_its_exif_says() -> None:
    entries = [(0x0100, 11, 1, struct.pack("<f", 1.5)), (0x0112, 3, 1, b"\x06\0\0\0")]  # a width that is no integer; a quarter turn
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"".join(struct.pack("<HHI4s", *entry) for entry in entries) + bytes(4)
    assert hwc(encoded(Image.fromarray(SMOOTH), "jpeg", exif=exif)).shape == (56, 40, 3)


def test_a_file_over_which_pillow_stumbles_is_unreadable_and_no_traceback() -> None:
    data = encoded(Image.fromarray(SMOOTH[..., 0]), "tiff")
    strips = struct.pack("<HH", 273, 4)  # where they begin, an integer
    assert data.count(strips) == 1
    with pytest.raises(Undecodable, match=r"not a readable image .'float' object cannot be"):
        decode(data.replace(strips, struct.pack("<HH", 273, 11)))


def test_sixteen_bits_a_colour_keep_their_high_byte() -> None:
    deep = (SMOOTH.astype(">u2") << 8) | 77
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 56, 40, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep))),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    assert np.array_equal(hwc(data), SMOOTH)


@pytest.mark.parametrize(
    ("kind", "mode"), [("png", "RGB"), ("jpeg", "RGB"), ("jpeg", "CMYK"), ("png", "LA"), ("gif", "P"), ("webp", "RGBA")]
)
def test_a_picture_of_one_pixel_fills_the_input(kind: str, mode: str) -> None:
    image = decode(encoded(Image.new("RGB", (1, 1), (200, 200, 200)).convert(mode), kind))
    assert image.shape == (3, 1, 1)
    for resize_mode in ("squash", "shortest"):
        filled = eval_transform(image, Preprocess(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode=resize_mode))
        assert filled.shape == (3, 16, 16)
        assert (filled == image).all()


def test_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 255)]
    assert hwc(encoded(frames[0], "gif", save_all=True, append_images=frames[1:])).max() == 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "is empty"), (b"<html>not found</html>", "<html>"), (encoded(Image.fromarray(SMOOTH), "png")[:200], "not a readable image"),
     (encoded(Image.fromarray(SMOOTH), "jpeg")[:400], "not a readable image"), (b"\xff\xd8\xff\xe0", "not a readable image")],
)  # fmt: skip
def test_what_is_no_image_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(Undecodable, match=reason):
        decode(data)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_transform_is_pillow_within_three_levels(interpolation: str) -> None:
    preprocess = Preprocess(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation=interpolation)
    ours = eval_transform(torch.from_numpy(SMOOTH.copy()).permute(2, 0, 1), preprocess).permute(1, 2, 0).numpy().astype(int)
    method = Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC
    theirs = np.asarray(Image.fromarray(SMOOTH).resize((22, 16), method)).astype(int)[:, 3:19]
    assert ours.shape == (16, 16, 3)
    assert abs(ours - theirs).max() <= 3


@pytest.mark.parametrize("shape", [(3, 2, 4801), (3, 4800, 2), (3, 1, 1003)])
def test_a_line_is_cropped_before_it_is_resized_to_gigabytes(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.from_numpy(RNG.integers(0, 256, shape, np.uint8))
    preprocess = Preprocess(size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    resized: list[int] = []
    resize = functional.resize
    monkeypatch.setattr(
        functional, "resize", lambda image, *rest, **named: (resized.append(max(image.shape)), resize(image, *rest, **named))[1]
    )
    ours = eval_transform(image, preprocess)
    monkeypatch.setattr("stockpot.data.images.LONGEST", 10**9)
    whole = eval_transform(image, preprocess)
    assert (ours.int() - whole.int()).abs().max() <= 1
    assert resized[0] <= 1002 * min(shape[1:]) < resized[1] == max(shape)


def test_squashing_keeps_the_whole_picture_and_another_transform_has_another_digest() -> None:
    squash = Preprocess(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash")
    assert eval_transform(torch.from_numpy(SMOOTH.copy()).permute(2, 0, 1), squash).shape == (3, 16, 16)
    assert transform_digest(squash) != transform_digest(squash.model_copy(update={"resize_mode": "shortest"}))
