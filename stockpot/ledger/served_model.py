"""The registered model, as MLflow runs it: this one file, `model.safetensors` and `model.json`. No pickle, nothing of Stockpot.

It is executed in whatever process calls `mlflow.pyfunc.load_model`, so it imports only what the model's pinned requirements name.
Decoding and preprocessing repeat `stockpot.data.images` rule by rule; a test holds the two together. Anything that is no real image is
refused.
"""

import base64
import binascii
import io
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import timm
import torch
from mlflow.pyfunc import PythonModel
from open_clip.model import _build_vision_tower
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as pictures

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64 * 10**6
BATCH = 256

# B images, S side in pixels, C classes


class Soup(PythonModel):  # type: ignore[misc]  # mlflow is untyped
    """Image bytes in; the most likely classes and their probabilities out."""

    def load_context(self, context: Any) -> None:
        """Build the classifier and load its weights, on a GPU where there is one."""
        folder = Path(context.artifacts["soup"])
        config = json.loads((folder / "model.json").read_text())
        self.classes: list[str] = config["classes"]
        self.preprocess: dict[str, Any] = config["preprocess"]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = build(config)
        self.model.load_state_dict(read_weights(folder / "model.safetensors"))
        self.model.to(self.device).eval()

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002  (mlflow reads hints as a schema)
        """Per image its `label` and `probability`, and `top`: the `top_k` likeliest classes as `{"label", "probability"}`, best first.

        Column `image`: encoded bytes, or their base64. params: `top_k`, at least 1; more than there are classes means all of them.
        Raises ValueError for anything else, naming the row.
        """
        values, top_k = column(model_input), (params or {}).get("top_k", 1)
        if top_k < 1:
            raise ValueError(f"found top_k {top_k}; needed: 1 or more")
        answers = []
        for start in range(0, len(values), BATCH):  # decoded batch by batch: pixels take far more memory than files
            images = [self._transformed(image(value, start + row)) for row, value in enumerate(values[start : start + BATCH])]
            likely = self.logits(torch.stack(images)).softmax(dim=1).topk(min(top_k, len(self.classes)), dim=1)
            answers += [self._answer(*row) for row in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)]
        return answers

    def _answer(self, places: list[int], probabilities: list[float]) -> dict[str, Any]:
        top = [{"label": self.classes[place], "probability": share} for place, share in zip(places, probabilities, strict=True)]
        return {**top[0], "top": top}

    @torch.inference_mode()
    def logits(self, pixels_B3SS: Tensor) -> Tensor:
        """uint8 preprocessed pixels to float32 logits (B, C) on the CPU."""
        mean = torch.tensor(self.preprocess["mean"], device=self.device).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.preprocess["std"], device=self.device).view(1, 3, 1, 1) * 255
        logits_BC: Tensor = self.model((pixels_B3SS.to(self.device).float() - mean) / std)
        return logits_BC.float().cpu()

    def _transformed(self, image_3HW: Tensor) -> Tensor:
        size: int = self.preprocess["size"]
        side = round(size / self.preprocess.get("crop_fraction", 1.0))
        squash = self.preprocess["resize_mode"] == "squash"
        mode = InterpolationMode.BICUBIC if self.preprocess["interpolation"] == "bicubic" else InterpolationMode.BILINEAR
        if list(image_3HW.shape[-2:]) != [side, side]:
            image_3HW = pictures.resize(image_3HW, [side, side] if squash else [side], interpolation=mode, antialias=True)
        pixels_3SS: Tensor = pictures.center_crop(image_3HW, [size, size])
        return pixels_3SS


class Classifier(nn.Module):
    """Image tower, features (of unit length for CLIP), linear head."""

    def __init__(self, body: nn.Module, features: int, classes: int, *, unit: bool) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, classes)
        self.unit = unit

    def forward(self, images_B3SS: Tensor) -> Tensor:
        features_BD = self.body(images_B3SS)
        logits_BC: Tensor = self.head(functional.normalize(features_BD, dim=-1) if self.unit else features_BD)
        return logits_BC


class FromPixels(nn.Module):
    """The classifier as a plain PyTorch program: float32 pixels in [0, 1], resized and cropped, (B, 3, S, S) in; logits (B, C) out."""

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.classifier = classifier
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        logits_BC: Tensor = self.classifier((pixels_B3SS - self.mean) / self.std)
        return logits_BC


def export(folder: Path, target: Path) -> None:
    """Write the model in `folder` (`model.safetensors`, `model.json`) as a pt2 archive for any batch size: graph and tensors, no pickle."""
    config = json.loads((folder / "model.json").read_text())
    classifier = build(config)
    classifier.load_state_dict(read_weights(folder / "model.safetensors"))
    side = config["preprocess"]["size"]
    program = FromPixels(classifier, config["preprocess"]["mean"], config["preprocess"]["std"]).eval()
    example = torch.zeros(2, 3, side, side)  # two: a batch of one would be exported as always one
    torch.export.save(torch.export.export(program, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},)), target)


def build(config: dict[str, Any]) -> Classifier:
    """The architecture in `model.json`, with random weights."""
    kind, arch = config["kind"], config["arch"]
    if kind == "open_clip":
        body = _build_vision_tower(arch["embed_dim"], dict(arch["vision_cfg"]), arch.get("quick_gelu", False))
        return Classifier(body, arch["embed_dim"], len(config["classes"]), unit=True)
    if kind == "timm":
        body = timm.create_model(arch["name"], pretrained=False, num_classes=0)
        return Classifier(body, body.head_hidden_size, len(config["classes"]), unit=False)
    raise ValueError(f"this model file builds open_clip and timm classifiers, model.json says {kind!r}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict; names tied on saving share one tensor again."""
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        header = file.metadata() or {}
    for name, first in json.loads(header.get("stockpot", '{"tied": {}}'))["tied"].items():
        state[name] = state[first]
    return state


def column(model_input: Any) -> list[Any]:
    """The `image` column of a DataFrame, or of a list of dictionaries."""
    rows = model_input.to_dict("records") if hasattr(model_input, "to_dict") else model_input
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and set(row) == {"image"} for row in rows):
        raise ValueError("needed: at least one row with one column `image` holding an encoded image (bytes, or base64 text)")
    return [row["image"] for row in rows]


def image(value: Any, row: int) -> Tensor:
    """Encoded bytes, or base64 of them, to uint8 RGB (3, H, W). Raises ValueError naming the row and what was found."""
    if isinstance(value, str):
        if len(value) > MAX_BYTES * 4 // 3 + 4:
            raise ValueError(f"row {row}: found {len(value):,} characters of base64; needed: an image file of 1 to {MAX_BYTES:,} bytes")
        try:
            value = base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise ValueError(f"row {row}: the text is not base64 ({error}); needed: base64 of a PNG, JPEG or other image file") from error
    if not isinstance(value, bytes):
        raise ValueError(f"row {row}: found {type(value).__name__}; needed: the bytes of a PNG, JPEG or other image file, or their base64")
    if not 0 < len(value) <= MAX_BYTES:
        raise ValueError(f"row {row}: found {len(value):,} bytes; needed: an image file of 1 to {MAX_BYTES:,} bytes")
    try:
        with Image.open(io.BytesIO(value)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels, at most {MAX_PIXELS:,} are taken")
            return _decode(value, picture)
    except (RuntimeError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"row {row}: not a readable image ({reason})") from error


def _decode(data: bytes, picture: Image.Image) -> Tensor:
    """JPEG of one or three components by torchvision, everything else by Pillow: the rules of `stockpot.data.images`."""
    if data[:2] == b"\xff\xd8" and picture.mode in ("L", "RGB"):
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels_3HW: Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        return pixels_3HW
    picture.load()
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255 instead of scaling
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1).contiguous()


mlflow.models.set_model(Soup())
