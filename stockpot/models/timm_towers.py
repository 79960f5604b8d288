"""The door to timm: an image tower by name (`timm:vit_base_patch16_224`), with or without published weights, prepared as timm says.

A name may carry the tag of published weights (`timm:vit_base_patch16_224.augreg_in21k`): their way of preparing images is then the
model's, also for weights of the user's own. ImageNet's classifier is left behind: the sweep's head takes its place.
"""

import math
from typing import Any

import timm
from timm.data import resolve_data_config
from torch import Tensor, nn

from stockpot.config import BaseSpec
from stockpot.errors import ModelError
from stockpot.models.loading import fetch_state, load_state
from stockpot.models.naming import is_uri, nearest
from stockpot.preparation import Preprocess

PREFIX = "timm:"


def tower(arch: dict[str, Any]) -> tuple[nn.Module, int]:
    """The named tower with random weights and without a classifier, and its number of features after pooling."""
    body: nn.Module = timm.create_model(arch["name"], pretrained=False, num_classes=0)
    width = body.head_hidden_size
    assert isinstance(width, int)
    return body, width


def describe(base: BaseSpec) -> tuple[dict[str, Any], Preprocess]:
    """The architecture's name and tag, and how its images are prepared. Raises `ModelError`, with the nearest names."""
    name, _, tag = base.arch.removeprefix(PREFIX).partition(".")
    if not timm.is_model(name):
        raise ModelError(f"timm has no architecture `{name}`; {nearest(name, timm.list_models())}")
    weights = base.weights if base.weights and not is_uri(base.weights) else None
    if tag and weights and tag != weights:
        raise ModelError(f"The architecture names the weights `{tag}` and `weights` names `{weights}`; keep one of them.")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    for wanted in filter(None, (tag, weights)):
        if wanted not in tags:
            raise ModelError(f"`{PREFIX}{name}` has no weights tagged `{wanted}`; {nearest(wanted, tags)}")
    full = ".".join(filter(None, (name, weights or tag)))
    return {"name": full}, _preprocess(full)


def load(base: BaseSpec, arch: dict[str, Any]) -> tuple[dict[str, Tensor], None]:
    """The tower's weights: published ones, those at an address, or random ones. There is no text tower."""
    if base.weights is None:
        return tower(arch)[0].state_dict(), None
    if is_uri(base.weights):
        body = tower(arch)[0]
        load_state(body, _without_classifier(fetch_state(base.weights), body))
        return body.state_dict(), None
    try:
        published: nn.Module = timm.create_model(arch["name"], pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"The weights of `{PREFIX}{arch['name']}` cannot be fetched ({str(error).splitlines()[0]}); give their address as `weights` "
            "(s3://, file:// or a path), or open the way to the hub."
        ) from error
    return published.state_dict(), None


def layers(model: nn.Module) -> dict[str, int]:
    """timm's own number of the layer that each parameter belongs to, from the stem up, for what a model has of timm's; else nothing."""
    return {
        f"{name}.{parameter}".lstrip("."): layer
        for name, part in model.named_modules()
        if hasattr(part, "group_matcher")
        for parameter, layer in timm.models.group_parameters(part, part.group_matcher(coarse=False), reverse=True).items()
    }


def _without_classifier(state: dict[str, Tensor], body: Any) -> dict[str, Tensor]:
    """The tower's part of a whole timm model's weights."""
    classifier = body.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in heads}


def _preprocess(name: str) -> Preprocess:
    published = timm.models.get_pretrained_cfg(name)
    found = resolve_data_config(pretrained_cfg=published.to_dict()) if published else resolve_data_config({"img_size": 224})
    channels, height, width = found["input_size"]
    if channels != 3 or height != width or found["crop_mode"] == "border":
        raise ModelError(
            f"`{PREFIX}{name}` wants {channels} x {height} x {width} pixels, cropped by `{found['crop_mode']}`; needed are "
            "square RGB pictures cropped by `center` or `squash`: choose another tower."
        )
    return Preprocess(
        size=height,
        mean=found["mean"],
        std=found["std"],
        interpolation=found["interpolation"],
        resize_mode="squash" if found["crop_mode"] == "squash" else "shortest",
        crop_fraction=height / math.floor(height / found["crop_pct"]),
    )
