"""The registered model, as MLflow runs it: this one file, the weights, their config and fingerprint. No pickle, nothing of Stockpot.

It is executed in whatever process calls `mlflow.pyfunc.load_model`, so it imports only what the model's pinned requirements name.
Decoding and preprocessing repeat `stockpot.data.images` rule by rule; a test holds the two together. Anything that is no real image is
refused.
"""

import base64
import binascii
import copy
import importlib
import io
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import timm
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from open_clip.model import _build_text_tower, _build_vision_tower
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as pictures

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64 * 10**6
BATCH = 256

# B images, S side in pixels, C classes


class Refused(MlflowException, ValueError):  # type: ignore[misc]  # mlflow is untyped
    """Something that cannot be answered. A plain ValueError would reach an HTTP client as a stack trace; this one as its sentence."""

    def __init__(self, sentence: str) -> None:
        MlflowException.__init__(self, sentence, error_code=INVALID_PARAMETER_VALUE)


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
        require_same_logits(self.model.eval(), json.loads((folder / "fingerprint.json").read_text())["logits"], self.preprocess["size"])
        self.model.to(self.device)

    # MLflow reads the hint of `model_input` as a schema, and warns where there is none; a DataFrame's it leaves to the signature.
    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:  # noqa: ARG002
        """Per image its `label` and `probability`, and `top`: the `top_k` likeliest classes as `{"label", "probability"}`, best first.

        Column `image`: encoded bytes, or their base64. params: `top_k`, at least 1; more than there are classes means all of them.
        `labels` asks about these classes instead of those trained on, through `templates`, by the text tower if it was kept.
        Raises ValueError for anything else, naming the row.
        """
        given = params or {}
        values, top_k, classes, head = column(model_input), given.get("top_k", 1), self.classes, self.model.head
        if top_k < 1:
            raise Refused(f"found top_k {top_k}; needed: 1 or more")
        if labels := list(given.get("labels", ())):
            classes, head = labels, self.head_for(labels, list(given.get("templates", ["a photo of a {}."])))
        answers = []
        for start in range(0, len(values), BATCH):  # decoded batch by batch: pixels take far more memory than files
            images = [self._transformed(image(value, start + row)) for row, value in enumerate(values[start : start + BATCH])]
            likely = self.logits(torch.stack(images), head).softmax(dim=1).topk(min(top_k, len(classes)), dim=1)
            answers += [_answer(classes, *row) for row in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)]
        return answers

    @torch.inference_mode()
    def logits(self, pixels_B3SS: Tensor, head: nn.Module | None = None) -> Tensor:
        """uint8 preprocessed pixels to float32 logits (B, C) on the CPU, by the model's own head or another."""
        mean = torch.tensor(self.preprocess["mean"], device=self.device).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.preprocess["std"], device=self.device).view(1, 3, 1, 1) * 255
        features_BD = self.model.features((pixels_B3SS.to(self.device).float() - mean) / std)
        logits_BC: Tensor = (head or self.model.head)(features_BD)
        return logits_BC.float().cpu()

    @torch.inference_mode()
    def head_for(self, labels: list[str], templates: list[str]) -> nn.Linear:
        """A zero-shot head over these labels. Raises ValueError where the text tower was dropped or a template has not one `{}`."""
        if self.model.text is None:
            raise Refused("this version has no text tower, so it knows its own classes only; retrain with `text_tower: keep`")
        if not templates or not all(map(_holds_one_name, templates)):
            raise Refused("every template needs one `{}` for the label and no other braces, as in 'a photo of a {}.'")
        weight_CD = self.model.text.zero_shot_head(labels, templates, self.device)
        head = nn.Linear(weight_CD.shape[1], len(labels), bias=False, device=self.device)
        head.weight.copy_(weight_CD)
        return head

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

    def __init__(self, body: nn.Module, features: int, classes: int, *, unit: bool, text: "TextTower | None" = None) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, classes)
        self.unit = unit
        self.text = text

    def features(self, images_B3SS: Tensor) -> Tensor:
        features_BD: Tensor = self.body(images_B3SS)
        return functional.normalize(features_BD, dim=-1) if self.unit else features_BD

    def forward(self, images_B3SS: Tensor) -> Tensor:
        logits_BC: Tensor = self.head(self.features(images_B3SS))
        return logits_BC


class TextTower(nn.Module):
    """Class names to head weights: `stockpot.models.clip`, repeated."""

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__()
        self.text_cfg = dict(arch["text_cfg"])
        self.encoder: nn.Module = _build_text_tower(arch["embed_dim"], self.text_cfg, arch.get("quick_gelu", False))
        self.logit_scale = nn.Parameter(torch.zeros([1] if arch.get("nonscalar_logit_scale") else []))

    def zero_shot_head(self, labels: list[str], templates: list[str], device: str) -> Tensor:
        name, length = self.text_cfg.get("hf_tokenizer_name"), self.text_cfg.get("context_length", 77)
        tokenizer = HFTokenizer(name, context_length=length) if name else SimpleTokenizer(context_length=length)
        rows = []
        for label in labels:
            texts_TD = functional.normalize(self.encoder(tokenizer([one.format(label) for one in templates]).to(device)).float(), dim=-1)
            rows.append(functional.normalize(texts_TD.mean(dim=0), dim=0))
        return torch.stack(rows) * self.logit_scale.exp()


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
        return Classifier(
            body, arch["embed_dim"], len(config["classes"]), unit=True, text=TextTower(arch) if config.get("keep_text") else None
        )
    if kind == "timm":
        body = timm.create_model(arch["name"], pretrained=False, num_classes=0)
        return Classifier(body, body.head_hidden_size, len(config["classes"]), unit=False)
    if kind == "imported":
        return Classifier(_imported(arch["name"]), arch["features"], len(config["classes"]), unit=False)
    raise ValueError(f"this model file builds open_clip, timm and imported classifiers, model.json says {kind!r}")


def _imported(name: str) -> nn.Module:
    """A module of another package, or what its function makes: `stockpot.models.imported`, repeated."""
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    body: nn.Module = copy.deepcopy(found) if isinstance(found, nn.Module) else found()
    return body


@torch.inference_mode()
def require_same_logits(model: Classifier, stored: list[list[float]], side: int) -> None:
    """Raises ValueError unless the model says about fixed noise what it said when it was stored: `stockpot.models.folders`, repeated."""
    noise = np.random.default_rng(2203).integers(0, 256, (len(stored), 3, side, side), np.uint8)
    before, now = torch.tensor(stored), model(torch.from_numpy(noise).float() / 127.5 - 1)
    apart = float((before - now).abs().max() / before.abs().max().clamp(min=1e-12))
    if not apart <= 1e-4:
        raise ValueError(
            f"the loaded model is not the registered one: its logits differ from the stored ones by {apart:.1e} of the largest, 1e-4 is "
            "allowed; install the versions in requirements.txt, and leave model.json as it was registered"
        )


def _holds_one_name(template: str) -> bool:
    """Whether a prompt template has one `{}` and no other braces, as `stockpot.config.init` asks of a request."""
    try:
        return "{}" in template and template.format("ant") == template.replace("{}", "ant")
    except (LookupError, ValueError):
        return False


def _answer(classes: list[str], places: list[int], probabilities: list[float]) -> dict[str, Any]:
    top = [{"label": classes[place], "probability": share} for place, share in zip(places, probabilities, strict=True)]
    return {**top[0], "top": top}


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
        raise Refused("needed: at least one row with one column `image` holding an encoded image (bytes, or base64 text)")
    return [row["image"] for row in rows]


def image(value: Any, row: int) -> Tensor:
    """Encoded bytes, or base64 of them, to uint8 RGB (3, H, W). Raises ValueError naming the row and what was found."""
    if isinstance(value, str):
        if len(value) > MAX_BYTES * 4 // 3 + 4:
            raise Refused(f"row {row}: found {len(value):,} characters of base64; needed: an image file of 1 to {MAX_BYTES:,} bytes")
        try:
            value = base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise Refused(f"row {row}: the text is not base64 ({error}); needed: base64 of a PNG, JPEG or other image file") from error
    if not isinstance(value, bytes):
        raise Refused(f"row {row}: found {type(value).__name__}; needed: the bytes of a PNG, JPEG or other image file, or their base64")
    if not 0 < len(value) <= MAX_BYTES:
        raise Refused(f"row {row}: found {len(value):,} bytes; needed: an image file of 1 to {MAX_BYTES:,} bytes")
    try:
        with Image.open(io.BytesIO(value)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Refused(f"{picture.width} x {picture.height} pixels, at most {MAX_PIXELS:,} are taken")
            return _decode(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else (str(error) or type(error).__name__).splitlines()[0]
        raise Refused(f"row {row}: not a readable image ({reason})") from error


def _decode(picture: Image.Image) -> Tensor:
    """The rules of `stockpot.data.images`, by Pillow alone: uint8 RGB (3, H, W)."""
    picture.load()
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255 instead of scaling
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)


mlflow.models.set_model(Soup())
