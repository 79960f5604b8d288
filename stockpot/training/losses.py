"""What is minimised, and the mixing of images that goes with it. An image's partner is half a batch away, so the devices
of one trial, which hold every n-th image each, mix the pairs that one device would.

mixup: Zhang et al. 2018 (arXiv:1710.09412). CutMix: Yun et al. 2019 (arXiv:1905.04899).
"""

# B batch, C classes, H height, W width

import importlib
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stockpot.errors import BadRequest
from stockpot.preparation import Preparation, Tokens
from stockpot.settings import TrialSettings

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(logits (B, C), labels (B), labels of the partners (B), share of the label's own image) to the mean over the batch."""


def partners(samples_B: Tensor) -> Tensor:
    """What every sample of a batch is mixed with: the sample half a batch on, and back again where the batch is even."""
    return samples_B.roll(len(samples_B) // 2, 0)


def mix(images_B3HW: Tensor, settings: TrialSettings, rng: random.Random) -> tuple[Tensor, float]:
    """The batch mixed with its partners, by mixup or CutMix where the settings ask, and the share that is left of every image."""
    mixup, cutmix = settings.mixup, settings.cutmix
    if mixup > 0 and (cutmix <= 0 or rng.random() < 0.5):
        share = rng.betavariate(mixup, mixup)
        return share * images_B3HW + (1 - share) * partners(images_B3HW), share
    if cutmix > 0:
        return _cut(images_B3HW, rng.betavariate(cutmix, cutmix), rng)
    return images_B3HW, 1.0


def require_mixable(settings: TrialSettings, preparation: Preparation) -> None:
    """Raises `BadRequest` where settings ask for mixed inputs of a kind that does not mix."""
    if isinstance(preparation, Tokens) and (settings.mixup > 0 or settings.cutmix > 0):
        raise BadRequest("mixup and CutMix blend pixels and the model reads tokens; leave `mixup` and `cutmix` at 0.")


def loss_function(settings: TrialSettings) -> Loss:
    """The loss of that name. Raises `BadRequest` for a name nothing answers to."""
    smoothing = settings.label_smoothing
    if settings.loss == "cross_entropy":
        return lambda logits_BC, labels_B, partners_B, share: cross_entropy(logits_BC, labels_B, partners_B, share, smoothing=smoothing)
    function = binary_cross_entropy if settings.loss == "binary_cross_entropy" else _imported(settings.loss)

    def loss(logits_BC: Tensor, labels_B: Tensor, partners_B: Tensor, share: float) -> Tensor:
        return function(logits_BC, targets(labels_B, partners_B, share, classes=logits_BC.shape[1], smoothing=smoothing))

    return loss


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, partners_B: Tensor, share: float, *, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy against `share` of the label and the rest of the partner's."""
    loss = functional.cross_entropy(logits_BC, labels_B, label_smoothing=smoothing)
    if share < 1:
        loss = share * loss + (1 - share) * functional.cross_entropy(logits_BC, partners_B, label_smoothing=smoothing)
    return loss


def binary_cross_entropy(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """One yes-or-no question a class, summed over classes, mean over the batch: the scale of Beyer et al. 2020 (arXiv:2006.07159)."""
    return functional.binary_cross_entropy_with_logits(logits_BC, targets_BC.to(logits_BC.dtype), reduction="sum") / len(logits_BC)


def targets(labels_B: Tensor, partners_B: Tensor, share: float, *, classes: int, smoothing: float) -> Tensor:
    """Probabilities (B, C): `share` on the label, the rest on the partner's, then `smoothing` spread over all classes."""
    sharp_BC = share * functional.one_hot(labels_B, classes).float() + (1 - share) * functional.one_hot(partners_B, classes).float()
    return sharp_BC * (1 - smoothing) + smoothing / classes


def _cut(images_B3HW: Tensor, share: float, rng: random.Random) -> tuple[Tensor, float]:
    """A box of about 1 - share of the area from the partners; the share returned is exact, after clipping and rounding."""
    height, width = images_B3HW.shape[2:]
    tall, wide = round(height * (1 - share) ** 0.5), round(width * (1 - share) ** 0.5)
    row, column = rng.randrange(height), rng.randrange(width)
    top, bottom = max(0, row - tall // 2), min(height, row - tall // 2 + tall)
    left, right = max(0, column - wide // 2), min(width, column - wide // 2 + wide)
    mixed_B3HW = images_B3HW.clone()
    mixed_B3HW[:, :, top:bottom, left:right] = partners(images_B3HW)[:, :, top:bottom, left:right]
    return mixed_B3HW, 1 - (bottom - top) * (right - left) / (height * width)


def _imported(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    module, _, attribute = name.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
        if not callable(function):
            raise ValueError(f"it is {type(function).__name__}, not a function of logits and targets")
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError: a name that begins with a dot
        raise BadRequest(
            f"There is no loss `{name}` ({error}): write cross_entropy, binary_cross_entropy, or `package.module:name` "
            "of an installed package."
        ) from error
    return lambda logits_BC, targets_BC: torch.as_tensor(function(logits_BC, targets_BC))
