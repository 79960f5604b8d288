"""The door to open_clip: image and text towers by architecture name or own JSON config, weights by tag or address.

Only the image tower is fine-tuned; the text tower builds the zero-shot head and stays behind.
"""

# C classes, D features, T texts

import json
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from open_clip.model import _build_text_tower, _build_vision_tower  # the builders of one tower without the other
from torch import Tensor, nn
from torch.nn import functional

from stockpot import storage
from stockpot.config import BaseSpec
from stockpot.errors import ModelError
from stockpot.models.loading import fetch_state, load_state
from stockpot.models.naming import is_uri, nearest
from stockpot.preparation import Preprocess


class TextTower(nn.Module):
    """Class names to head weights. Frozen: fine-tuning moves images towards texts that stay where they are."""

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__()
        self.text_cfg = dict(arch["text_cfg"])
        self.encoder: nn.Module = _build_text_tower(arch["embed_dim"], self.text_cfg, arch.get("quick_gelu", False))
        self.logit_scale = nn.Parameter(torch.zeros([1] if arch.get("nonscalar_logit_scale") else []))
        self.requires_grad_(False)

    @torch.inference_mode()
    def zero_shot_head(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Head weights (C, D): per class, the mean of the templates' unit text embeddings, at unit length, times exp(logit_scale)."""
        self.eval()
        tokenizer, rows = _tokenizer(self.text_cfg), []
        for name in classes:
            texts_TD: Tensor = self.encoder(tokenizer([template.format(name) for template in templates]))
            rows.append(functional.normalize(functional.normalize(texts_TD.float(), dim=-1).mean(dim=0), dim=0))
        return torch.stack(rows) * self.logit_scale.exp()


def tower(arch: dict[str, Any]) -> tuple[nn.Module, int]:
    """The image tower of that config with random weights, and its number of features."""
    return _build_vision_tower(arch["embed_dim"], dict(arch["vision_cfg"]), arch.get("quick_gelu", False)), arch["embed_dim"]


def describe(base: BaseSpec) -> tuple[dict[str, Any], Preprocess]:
    """The full open_clip config of a base, and how its images are prepared. Raises `ModelError`, with the nearest names."""
    if is_uri(base.arch):
        try:
            config = json.loads(storage.read_bytes(base.arch))
            arch = config["model_cfg"]
            return arch, _preprocess(arch, config.get("preprocess_cfg", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f'`{base.arch}` is no open_clip config ({_first_line(error)}); it needs {{"model_cfg": ..., "preprocess_cfg": ...}}.'
            ) from error
    known = open_clip.get_model_config(base.arch)
    if known is None:
        raise ModelError(
            f"There is no architecture `{base.arch}`; {nearest(base.arch, open_clip.list_models())} timm's are written `timm:NAME`."
        )
    tag = open_clip.get_pretrained_cfg(base.arch, base.weights) if base.weights and not is_uri(base.weights) else {}
    if base.weights and not is_uri(base.weights) and not tag:
        tags = open_clip.list_pretrained_tags_by_model(base.arch)
        raise ModelError(f"`{base.arch}` has no weights tagged `{base.weights}`; {nearest(base.weights, tags)}")
    known["quick_gelu"] = known.get("quick_gelu", False) or tag.get("quick_gelu", False)  # tags say it where architectures do not
    return known, _preprocess(known, tag)


def load(base: BaseSpec, arch: dict[str, Any]) -> tuple[dict[str, Tensor], TextTower]:
    """The image tower's weights, and the text tower; random where the spec names no weights."""
    model = _whole(base, arch)
    if base.weights is not None and is_uri(base.weights):
        load_state(model, fetch_state(base.weights))
    elif base.weights is not None:
        open_clip.load_checkpoint(model, str(_downloaded(base)))
    text = TextTower(arch)
    state = model.state_dict()
    inner = {name: state[f"text.{name}"] if f"text.{name}" in state else state[name] for name in text.encoder.state_dict()}
    load_state(text, {"logit_scale": state["logit_scale"]} | {f"encoder.{name}": tensor for name, tensor in inner.items()})
    return model.get_submodule("visual").state_dict(), text


def _downloaded(base: BaseSpec) -> Any:
    """The path of the published weights."""
    try:
        return open_clip.download_pretrained(open_clip.get_pretrained_cfg(base.arch, base.weights))
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"The weights `{base.weights}` of `{base.arch}` cannot be fetched ({_first_line(error)}); give their address as `weights` "
            "(s3://, file:// or a path), or open the way to the hub."
        ) from error


def _first_line(error: Exception) -> str:
    """What it says; a missing name is all that a KeyError says."""
    return f"it has no {error}" if isinstance(error, KeyError) else (str(error).splitlines() or [type(error).__name__])[0]


def _whole(base: BaseSpec, arch: dict[str, Any]) -> nn.Module:
    """Both towers, as their weights are published: with a timm tower, or by name, open_clip keeps the text's names apart."""
    custom = arch.get("custom_text", False) or "timm_model_name" in arch["vision_cfg"]
    kwargs = {name: value for name, value in arch.items() if name != "custom_text"}
    try:
        model: nn.Module = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**kwargs)
    except TypeError as error:
        raise ModelError(f"The config of `{base.arch}` does not build ({error}); write it as open_clip's own JSON configs are.") from error
    return model


def _preprocess(arch: dict[str, Any], given: dict[str, Any]) -> Preprocess:
    size = given.get("size", arch["vision_cfg"].get("image_size", 224))
    return Preprocess(
        size=size[0] if isinstance(size, list | tuple) else size,
        mean=given.get("mean") or open_clip.OPENAI_DATASET_MEAN,
        std=given.get("std") or open_clip.OPENAI_DATASET_STD,
        interpolation=given.get("interpolation") or "bicubic",
        resize_mode=given.get("resize_mode") or "shortest",
    )


def _tokenizer(text_cfg: dict[str, Any]) -> Any:
    if "hf_tokenizer_name" in text_cfg:
        return open_clip.tokenizer.HFTokenizer(text_cfg["hf_tokenizer_name"], context_length=text_cfg.get("context_length", 77))
    return open_clip.SimpleTokenizer(context_length=text_cfg.get("context_length", 77))
