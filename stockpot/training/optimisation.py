"""How weights move: which are decayed, by which rule, at which rate. Knows tensors; knows no storage.

AdamW: Loshchilov & Hutter 2019 (arXiv:1711.05101). Adafactor: Shazeer & Stern 2018 (arXiv:1804.04235). SAM: Foret et al. 2021
(arXiv:2010.01412). The defaults of `TrialSettings` are those of Wortsman et al. 2022, appendix J.
"""

import math

import torch
from torch import Tensor, nn

from stockpot.config import TrialSettings


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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: matrices are decayed; biases, norms and scales (fewer than two dimensions) are not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def optimiser(model: nn.Module, settings: TrialSettings) -> torch.optim.Optimizer:
    """A fresh optimiser over the model's trainable parameters."""
    groups, rate = parameter_groups(model, settings.weight_decay), settings.learning_rate
    match settings.optimiser:
        case "adamw":
            return torch.optim.AdamW(groups, lr=rate, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=rate, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=0.9, fused=True)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=rate, momentum=0.9)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=rate)


def set_learning_rate(rule: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the same rate."""
    for group in rule.param_groups:
        group["lr"] = rate


@torch.no_grad()
def climb(model: nn.Module, rho: float) -> list[tuple[nn.Parameter, Tensor]]:
    """SAM's first half: move every parameter up its gradient, by `rho` in all. Returns the parameters and their values before."""
    moved = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in moved if parameter.grad is not None])
    before = [(parameter, parameter.clone()) for parameter in moved]
    for parameter in moved:
        if parameter.grad is not None:
            parameter.add_(parameter.grad * (rho / (norm + 1e-12)))
    return before


@torch.no_grad()
def descend(before: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Undo `climb`, to the bit: the gradient found up there is then applied down here."""
    for parameter, value in before:
        parameter.copy_(value)
