"""The door to open_clip (and timm): architectures by name or own config, weights by tag or address, one `Classifier` for all.

A classifier is an image tower (`body.*`) and a linear head (`head.weight`, `head.bias`). The whole config, activation included, travels
with the weights as JSON, because a tag's activation is not part of its architecture's name (OpenAI's weights need QuickGELU). Only the
image tower is fine-tuned; the text tower builds the zero-shot head and stays behind.
"""

# B batch, C classes, D features, H height, W width, T tokens

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import open_clip
import torch
from open_clip.model import _build_vision_tower  # the one builder of a tower without its text half
from torch import Tensor, nn
from torch.nn import functional

from stockpot import storage
from stockpot.checkpoints import load_weights
from stockpot.config import BaseSpec, Closed, Preprocess
from stockpot.errors import ModelError


class ModelConfig(Closed):
    """Everything needed to build a classifier, without its weights."""

    kind: Literal["open_clip"]
    arch: dict[str, Any]
    preprocess: Preprocess
    classes: tuple[str, ...]


class Classifier(nn.Module):
    """Image tower, L2-normalised features, linear head: (B, 3, H, W) normalised float to (B, C) logits."""

    def __init__(self, config: ModelConfig, body: nn.Module, features: int) -> None:
        super().__init__()
        self.config = config
        self.body = body
        self.head = nn.Linear(features, len(config.classes))

    def features(self, images_B3HW: Tensor) -> Tensor:
        """What the head sees: (B, D), unit length."""
        return functional.normalize(self.body(images_B3HW), dim=-1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        logits_BC: Tensor = self.head(self.features(images_B3HW))
        return logits_BC


@dataclass(frozen=True)
class Base:
    """A base model: its config without classes, both towers, and how its text is cut into tokens."""

    arch: dict[str, Any]
    preprocess: Preprocess
    model: nn.Module

    def body_state(self) -> dict[str, Tensor]:
        """The image tower's weights under the names of a `Classifier`."""
        visual: nn.Module = self.model.get_submodule("visual")
        return {f"body.{name}": tensor for name, tensor in visual.state_dict().items()}

    @torch.inference_mode()
    def zero_shot_head(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Head weights (C, D): per class, the mean of the templates' unit text embeddings, at unit length, times exp(logit_scale)."""
        self.model.eval()
        tokenizer = _tokenizer(self.arch["text_cfg"])
        rows = []
        for name in classes:
            texts_TD: Tensor = self.model.encode_text(tokenizer([template.format(name) for template in templates]))  # type: ignore[operator]
            rows.append(functional.normalize(functional.normalize(texts_TD.float(), dim=-1).mean(dim=0), dim=0))
        scale: Tensor = self.model.get_parameter("logit_scale").exp()
        return torch.stack(rows) * scale


def build(config: ModelConfig) -> Classifier:
    """A classifier of that config with random weights, on the CPU."""
    width = config.arch["embed_dim"]
    body = _build_vision_tower(width, dict(config.arch["vision_cfg"]), config.arch.get("quick_gelu", False))
    return Classifier(config, body, width)


def load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put weights into a model. Raises `ModelError` naming the first key that differs, and both shapes."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise ModelError(
                f"The weights do not fit the architecture: `{name}` is {found.get(name, 'missing')} in the weights and "
                f"{wanted.get(name, 'unknown')} in the model. Name the architecture the weights were trained with."
            )
    model.load_state_dict(state)


def load_base(base: BaseSpec, *, seed: int = 0) -> Base:
    """The base model with its text tower, on the CPU; random weights from the seed when the spec names none.

    Raises `ModelError` for an unknown architecture or tag (nearest names offered) and for weights of another shape.
    """
    arch, preprocess = _describe(base)
    torch.manual_seed(seed)
    custom = arch.get("custom_text", False) or "timm_model_name" in arch["vision_cfg"]
    kwargs = {name: value for name, value in arch.items() if name != "custom_text"}
    try:
        model: nn.Module = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**kwargs)
    except TypeError as error:
        raise ModelError(f"The config of `{base.arch}` does not build ({error}); write it as open_clip's own JSON configs are.") from error
    if base.weights is not None:
        _load_weights(model, base)
    return Base(arch, preprocess, model)


def _describe(base: BaseSpec) -> tuple[dict[str, Any], Preprocess]:
    """The full open_clip config of a base, and how its images are prepared."""
    if _is_uri(base.arch):
        try:
            config = json.loads(storage.read_bytes(base.arch))
            arch, preprocess = config["model_cfg"], config.get("preprocess_cfg", {})
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f'`{base.arch}` is no open_clip config ({error}); it needs {{"model_cfg": ..., "preprocess_cfg": ...}}.'
            ) from error
        return arch, _preprocess(arch, preprocess)
    known = open_clip.get_model_config(base.arch)
    if known is None:
        raise ModelError(f"There is no architecture `{base.arch}`; {_nearest(base.arch, open_clip.list_models())}.")
    tag = open_clip.get_pretrained_cfg(base.arch, base.weights) if base.weights and not _is_uri(base.weights) else {}
    if base.weights and not _is_uri(base.weights) and not tag:
        tags = open_clip.list_pretrained_tags_by_model(base.arch)
        raise ModelError(f"`{base.arch}` has no weights tagged `{base.weights}`; {_nearest(base.weights, tags)}.")
    if tag:
        known["quick_gelu"] = tag.get("quick_gelu", False)
    return known, _preprocess(known, tag)


def _preprocess(arch: dict[str, Any], given: dict[str, Any]) -> Preprocess:
    size = given.get("size", arch["vision_cfg"].get("image_size", 224))
    return Preprocess(
        size=size[0] if isinstance(size, list | tuple) else size,
        mean=given.get("mean") or open_clip.OPENAI_DATASET_MEAN,
        std=given.get("std") or open_clip.OPENAI_DATASET_STD,
        interpolation=given.get("interpolation") or "bicubic",
        resize_mode=given.get("resize_mode") or "shortest",
    )


def _load_weights(model: nn.Module, base: BaseSpec) -> None:
    assert base.weights is not None
    if _is_uri(base.weights):
        with TemporaryDirectory(prefix="stockpot-weights-") as folder:
            path = Path(folder) / "weights.safetensors"
            storage.download(base.weights, path)
            load_state(model, load_weights(path))
        return
    path = Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(base.arch, base.weights)))
    open_clip.load_checkpoint(model, str(path))


def _tokenizer(text_cfg: dict[str, Any]) -> Any:
    if "hf_tokenizer_name" in text_cfg:
        return open_clip.tokenizer.HFTokenizer(text_cfg["hf_tokenizer_name"], context_length=text_cfg.get("context_length", 77))
    return open_clip.SimpleTokenizer(context_length=text_cfg.get("context_length", 77))


def _is_uri(text: str) -> bool:
    return "://" in text or text.startswith("/")


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(f'`{match}`' for match in close)}?" if close else f"known are {', '.join(sorted(known)) or 'none'}"
