"""How weights move: which are decayed, by which rule, at which rate. Knows tensors; knows no storage.

AdamW: Loshchilov & Hutter 2019 (arXiv:1711.05101). Adafactor: Shazeer & Stern 2018 (arXiv:1804.04235). SAM: Foret et al. 2021
(arXiv:2010.01412). Rates by layer: Clark et al. 2020 (arXiv:2003.10555) and, for vision, Bao et al. 2021 (arXiv:2106.08254). The defaults
of `TrialSettings` are those of Wortsman et al. 2022, appendix J.
"""

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stockpot.errors import BadRequest
from stockpot.models.timm_towers import layers as timm_layers
from stockpot.settings import TrialSettings

EMBEDDINGS = re.compile(
    r"(^|\.)(class_embedding|positional_embedding|token_embedding|embeddings|conv1|ln_pre|conv_stem|stem|patch_embed|pos_embed|cls_token"
    r"|reg_token|norm_pre|shared|embed_tokens)(\.|$)"
)
"""What comes before the first block, by the names open_clip, timm and transformers give it."""
STAGE = re.compile(r"(^|\.)layer([1-4])\.")
"""A ResNet's stages, whose blocks are numbered anew in each: a stage is one layer."""
STEM = re.compile(r"^(body\.)?(trunk\.)?(conv[1-3]|bn[1-3])\.")
"""What comes before a ResNet's stages; inside them the same names are a block's."""


def warmup(settings: TrialSettings, total_steps: int) -> int:
    """Steps of linear rise: as asked, but never more than a tenth of all steps."""
    return min(settings.warmup_steps, total_steps // 10)


def learning_rate(settings: TrialSettings, step: int, total_steps: int) -> float:
    """The rate of optimiser step `step`, counted from 0. A pure function of the step, so a resumed trial needs no schedule state."""
    rise = warmup(settings, total_steps)
    if step < rise:
        return settings.learning_rate * (step + 1) / rise
    done = (step - rise) / max(1, total_steps - rise)
    match settings.schedule:
        case "constant":
            return settings.learning_rate
        case "linear":
            return settings.learning_rate * (1 - done)
        case "cosine":
            return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Keep the parameters of these names as they are; see `frozen_names`."""
    for name in frozen_names(model, patterns):
        model.get_parameter(name).requires_grad_(False)


def frozen_names(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    """The parameters that the patterns name; `*` and `?` are wildcards.

    Raises `BadRequest` for a pattern that names none, with the nearest names, and when nothing is left to train: a head that the init
    keeps frozen is not.
    """
    parameters = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(parameters, pattern)
        if not matched:
            near = difflib.get_close_matches(pattern, parameters, n=3, cutoff=0.0)
            raise BadRequest(f"`frozen: {pattern}` names no parameter of the model; near are {', '.join(f'`{name}`' for name in near)}.")
        frozen.update(matched)
    if frozen.issuperset(name for name, parameter in model.named_parameters() if parameter.requires_grad):
        raise BadRequest(
            "`frozen` leaves no parameter to train (`init.freeze_head` freezes the head, where it is asked for); to evaluate the "
            "init as it is, ask for `max_steps: 0`."
        )
    return frozen


def rate_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """The share of the learning rate that each trainable parameter has: decay to the power of its distance from the top."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {name: layer for name, layer in layer_numbers(model).items() if name in trainable}
    top = max((layer for layer in layers.values() if layer is not None), default=0) + 1
    return {name: 1.0 if layer is None else layer_decay ** (top - layer) for name, layer in layers.items()}


def require_layers(model: nn.Module) -> None:
    """Raises `BadRequest` for a model that tells no block from another."""
    if not any(layer_numbers(model).values()):
        raise BadRequest(
            "`layer_decay` needs a model whose blocks are numbered in the names of their parameters (`blocks.0.weight`), and this one's "
            "are not; leave `layer_decay` at 1, or number them."
        )


def layer_numbers(model: nn.Module) -> dict[str, int | None]:
    """The layer of every parameter, from 0; None is the top: the last norm, the projection, the head.

    A timm tower's layers are timm's own. Elsewhere names tell: embeddings are layer 0, block i is layer i + 1 by the first number in its
    name, and stage i of a ResNet is layer i.
    """
    names = [name for name, _ in model.named_parameters()]
    if known := timm_layers(model):
        return {name: known.get(name) for name in names}
    depth = _resnet_depth if any(STAGE.search(name) for name in names) else _depth
    return {name: depth(name) for name in names}


def _depth(name: str) -> int | None:
    if EMBEDDINGS.search(name):
        return 0
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) + 1 if number else None


def _resnet_depth(name: str) -> int | None:
    stage = STAGE.search(name)
    return int(stage[2]) if stage else 0 if STEM.match(name) else None


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, object]]:
    """Trainable parameters, in two groups for each rate: matrices are decayed; biases, norms and scales (fewer than two dimensions) are
    not. `scale` is a group's share of the learning rate."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    scales = rate_scales(model, layer_decay)
    return [
        {
            "params": [parameter for name, parameter in trainable.items() if scales[name] == scale and (parameter.ndim >= 2) == decayed],
            "weight_decay": weight_decay if decayed else 0.0,
            "scale": scale,
        }
        for scale in sorted(set(scales.values()), reverse=True)
        for decayed in (True, False)
    ]


def optimiser(model: nn.Module, settings: TrialSettings, *, sharded: bool = False) -> torch.optim.Optimizer:
    """A fresh optimiser over the model's trainable parameters. sharded: they are shares, which SGD cannot move in one kernel."""
    groups, rate = parameter_groups(model, settings.weight_decay, settings.layer_decay), settings.learning_rate
    match settings.optimiser:
        case "adamw":
            return torch.optim.AdamW(groups, lr=rate, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=rate, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=0.9, fused=not sharded)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=rate, momentum=0.9)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=rate)


def set_learning_rate(rule: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group its share of the rate."""
    for group in rule.param_groups:
        group["lr"] = rate * group["scale"]


@torch.no_grad()
def climb(model: nn.Module, rho: float) -> list[tuple[nn.Parameter, Tensor]]:
    """SAM's first half: move every parameter up its gradient, by `rho` in all. Returns the parameters and their values before.

    Along a gradient that overflowed, as fp16's first ones may, nobody moves: weights that are no numbers would ruin BatchNorm's statistics.
    """
    moved = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in moved if parameter.grad is not None])
    finite = norm.isfinite()
    before = [(parameter, parameter.clone()) for parameter in moved]
    for parameter in moved:
        if parameter.grad is not None:
            parameter.add_(torch.where(finite, parameter.grad * (rho / (norm + 1e-12)), 0.0))
    return before


@torch.no_grad()
def descend(before: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Undo `climb`, to the bit: the gradient found up there is then applied down here."""
    for parameter, value in before:
        parameter.copy_(value)
