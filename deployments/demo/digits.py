"""scikit-learn's handwritten digits as Stockpot snapshots: 1,797 real pictures of 8x8 pixels (Alpaydin and Kaynak, UCI 1998).

Six snapshots, drawn by one seed: `digits-pretrain` (300), `digits` (train 400, held_out 400, gate 200), `digits-test` (497), and the same
497 pictures under three shifts at 32 px. Pixel = round(value * 255 / 16), 8-bit grey PNG.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.splits import SplitSpec
from stockpot.preparation import Preprocess
from stockpot.storage import join

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PREPROCESS = Preprocess(size=32, mean=(0.3,) * 3, std=(0.35,) * 3, interpolation="bilinear", resize_mode="squash")
PRETRAIN, TRAIN, HELD_OUT, GATE = 300, 400, 400, 200
ROTATION_DEGREES, NOISE_SD, BLUR_PX = 25.0, 0.8, 9


def publish_digits(root_uri: str, seed: int) -> dict[str, Any]:
    """Publish all six snapshots below `root_uri`; publishing again changes nothing.

    Returns manifest addresses: `pretrain`, `snapshot`, `test`, and `shifts` with `rotation`, `noise`, `blur`.
    """
    from sklearn.datasets import load_digits  # 0.5 s to import, needed only here

    bunch = load_digits()
    pixels = _pixels(bunch)
    parts = _parts(len(pixels), seed)

    def put(name: str, ids: np.ndarray[Any, Any], images: np.ndarray[Any, Any], splits: SplitSpec | str) -> str:
        samples = _samples(ids, images, bunch.target)
        return publish(join(root_uri, name), name, CLASSES, GivenSamples(samples), splits=splits).uri

    test = parts["digits-test"]
    return {
        "pretrain": put("digits-pretrain", parts["digits-pretrain"], pixels, "train"),
        "snapshot": put("digits", parts["digits"], pixels, SplitSpec(held_out=HELD_OUT, gate=GATE, salt=f"digits/{seed}")),
        "test": put("digits-test", test, pixels, "test"),
        "shifts": {name: put(f"digits-{name}", test, images, "test") for name, images in _shifts(pixels, test, seed).items()},
    }


def test_pictures(seed: int) -> list[tuple[bytes, str]]:
    """The test part as a service would receive it: PNG bytes and the right word, in the order of the snapshot."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    test = _parts(len(bunch.images), seed)["digits-test"]
    return [(sample.data, CLASSES[sample.label]) for sample in _samples(test, _pixels(bunch), bunch.target)]


def _pixels(bunch: Any) -> np.ndarray[Any, Any]:
    pixels_N88: np.ndarray[Any, Any] = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    return pixels_N88


def _parts(count: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    order = np.random.Generator(np.random.PCG64([seed, 2203])).permutation(count)
    main = PRETRAIN + TRAIN + HELD_OUT + GATE
    return {"digits-pretrain": order[:PRETRAIN], "digits": order[PRETRAIN:main], "digits-test": order[main:]}


def _samples(ids: np.ndarray[Any, Any], images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Iterator[Sample]:
    for number in np.sort(ids):
        file = io.BytesIO()
        Image.fromarray(images[number], mode="L").save(file, "png")
        yield Sample(f"digit-{number:04d}", file.getvalue(), int(labels[number]))


def _shifts(pixels_N88: np.ndarray[Any, Any], test: np.ndarray[Any, Any], seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """The test pictures at 32 px: turned by up to 25 degrees, under Gaussian noise of 0.8 model units, blurred by a 9x9 box."""
    rng = np.random.Generator(np.random.PCG64([seed, 5482]))
    small = torch.from_numpy(np.repeat(pixels_N88[test][:, None], 3, axis=1))
    large = functional.resize(small, [32, 32], interpolation=functional.InterpolationMode.BILINEAR, antialias=True)[:, :1].float()
    angles = rng.uniform(-ROTATION_DEGREES, ROTATION_DEGREES, len(test))
    noise = torch.from_numpy(rng.normal(0, NOISE_SD * PREPROCESS.std[0] * 255, large.shape).astype(np.float32))
    turned = [
        functional.rotate(image, float(angle), functional.InterpolationMode.BILINEAR) for image, angle in zip(large, angles, strict=True)
    ]
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(large, [BLUR_PX // 2] * 4, mode="reflect"), BLUR_PX, stride=1)
    shifted = {"rotation": torch.stack(turned), "noise": large + noise, "blur": blurred}
    full = {}
    for name, images in shifted.items():
        full[name] = np.zeros((len(pixels_N88), 32, 32), np.uint8)
        full[name][test] = images[:, 0].round().clamp(0, 255).byte().numpy()
    return full
