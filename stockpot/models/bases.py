"""The base model of a sweep, whatever door it comes through: its config without classes, its image tower's weights, its text tower."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stockpot.config import BaseSpec, Preprocess
from stockpot.models import clip, timm_towers
from stockpot.models.classifier import Kind, ModelConfig
from stockpot.models.clip import TextTower


@dataclass(frozen=True)
class Base:
    """A base model on the CPU."""

    kind: Kind
    arch: dict[str, Any]
    preprocess: Preprocess
    tower: dict[str, Tensor]
    """The image tower's weights, under its own names."""
    text: TextTower | None

    def config(self, classes: tuple[str, ...]) -> ModelConfig:
        """The config of its classifier over these classes."""
        return ModelConfig(kind=self.kind, arch=self.arch, preprocess=self.preprocess, classes=classes)

    def body_state(self) -> dict[str, Tensor]:
        """The image tower's weights under the names of a `Classifier`."""
        return {f"body.{name}": tensor for name, tensor in self.tower.items()}


def load_base(base: BaseSpec, *, seed: int = 0) -> Base:
    """The base model; random weights from the seed when the spec names none.

    Raises `ModelError` for an unknown architecture or tag (nearest names offered) and for weights of another shape.
    """
    if base.arch.startswith(timm_towers.PREFIX):
        arch, preprocess = timm_towers.describe(base)
        torch.manual_seed(seed)
        return Base("timm", arch, preprocess, timm_towers.load(base, arch), None)
    arch, preprocess = clip.describe(base)
    torch.manual_seed(seed)
    tower, text = clip.load(base, arch)
    return Base("open_clip", arch, preprocess, tower, text)
