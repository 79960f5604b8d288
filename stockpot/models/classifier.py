"""One `Classifier` for every origin: an image tower (`body.*`), a linear head (`head.weight`, `head.bias`).

The whole config, activation included, travels with the weights as JSON, because weights alone do not say what they compute (OpenAI's need
QuickGELU, which is part of no tensor's name).
"""

# B batch, C classes, D features, H height, W width

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional

from stockpot.config import Closed, Preprocess
from stockpot.models import clip, timm_towers

Kind = Literal["open_clip", "timm"]

TOWERS: dict[Kind, Callable[[dict[str, Any]], tuple[nn.Module, int]]] = {"open_clip": clip.tower, "timm": timm_towers.tower}
"""Kind to what builds its image tower: (arch) to (the tower, its number of features)."""


class ModelConfig(Closed):
    """Everything needed to build a classifier, without its weights."""

    kind: Kind
    arch: dict[str, Any]
    preprocess: Preprocess
    classes: tuple[str, ...]


class Classifier(nn.Module):
    """Image tower, features, linear head: (B, 3, H, W) normalised float to (B, C) logits.

    A CLIP tower's features are brought to unit length, as they were trained; others go to the head as they come.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.body, width = TOWERS[config.kind](config.arch)
        self.head = nn.Linear(width, len(config.classes))

    def features(self, images_B3HW: Tensor) -> Tensor:
        """What the head sees: (B, D)."""
        features_BD: Tensor = self.body(images_B3HW)
        return functional.normalize(features_BD, dim=-1) if self.config.kind == "open_clip" else features_BD

    def forward(self, images_B3HW: Tensor) -> Tensor:
        logits_BC: Tensor = self.head(self.features(images_B3HW))
        return logits_BC


def build(config: ModelConfig) -> Classifier:
    """A classifier of that config with random weights, on the CPU."""
    return Classifier(config)
