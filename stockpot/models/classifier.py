"""One `Classifier` for every origin: an image tower or text encoder (`body.*`), a linear head (`head.weight`, `head.bias`).
A CLIP model may keep its text tower (`text.*`), frozen: then it can still be asked about classes it was not trained on.

The whole config, activation included, travels with the weights as JSON, because weights alone do not say what they compute (OpenAI's need
QuickGELU, which is part of no tensor's name).
"""

# B batch, C classes, D features, ... the shape of one input: 3, H, W of an image, L of tokens

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from stockpot.errors import ModelError
from stockpot.fields import Closed
from stockpot.models import clip, encoders, imported, timm_towers
from stockpot.models.clip import TextTower
from stockpot.models.loading import load_state
from stockpot.preparation import Preparation

Kind = Literal["open_clip", "timm", "transformers", "imported"]

TOWERS: dict[Kind, Callable[[dict[str, Any]], tuple[nn.Module, int]]] = {
    "open_clip": clip.tower,
    "timm": timm_towers.tower,
    "transformers": encoders.tower,
    "imported": imported.tower,
}
"""Kind to what builds its tower: (arch) to (the tower, its number of features)."""


class ModelConfig(Closed):
    """Everything needed to build a classifier, without its weights."""

    kind: Kind
    arch: dict[str, Any]
    preprocess: Preparation
    classes: tuple[str, ...]
    keep_text: bool = Field(False, description="Whether the text tower travels along.")
    frozen_head: bool = Field(False, description="Whether training leaves the head as it is.")


class Classifier(nn.Module):
    """Tower, features, linear head: images (B, 3, H, W) of normalised floats, or tokens (B, L) of int32, to (B, C) logits.

    A CLIP tower's features are brought to unit length, as they were trained; others go to the head as they come.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.body, width = TOWERS[config.kind](config.arch)
        self.head = nn.Linear(width, len(config.classes)).requires_grad_(not config.frozen_head)
        self.text = TextTower(config.arch) if config.keep_text else None

    def features(self, inputs_B: Tensor) -> Tensor:
        """What the head sees: (B, D)."""
        features_BD: Tensor = self.body(inputs_B)
        return functional.normalize(features_BD, dim=-1) if self.config.kind == "open_clip" else features_BD

    def forward(self, inputs_B: Tensor) -> Tensor:
        logits_BC: Tensor = self.head(self.features(inputs_B))
        return logits_BC

    def for_classes(self, classes: Sequence[str], templates: Sequence[str]) -> "Classifier":
        """The same image tower asked about other classes by name: zero-shot. Raises `ModelError` where the text tower was dropped."""
        if self.text is None:
            raise ModelError("The model has no text tower to read class names with; train it with `text_tower: keep`.")
        twin = Classifier(self.config.model_copy(update={"classes": tuple(classes)}))
        head = {"head.weight": self.text.zero_shot_head(classes, templates), "head.bias": torch.zeros(len(classes))}
        load_state(twin, self.state_dict() | head)
        return twin


def build(config: ModelConfig) -> Classifier:
    """A classifier of that config with random weights, on the CPU."""
    return Classifier(config)
