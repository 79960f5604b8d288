"""The base model of a sweep, whatever door it comes through: its config without classes, the weights of its tower, its text tower."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stockpot.config import TEXT_PREFIX, BaseSpec
from stockpot.errors import ModelError
from stockpot.models import clip, encoders, imported, timm_towers
from stockpot.models.classifier import Kind, ModelConfig
from stockpot.models.clip import TextTower
from stockpot.models.naming import is_uri
from stockpot.preparation import Preparation, Tokens

DOORS: dict[Kind, Any] = {"open_clip": clip, "timm": timm_towers, "transformers": encoders, "imported": imported}
"""Each has `describe`, a base to its arch and preparation, and `load`, these to the tower's weights and a text tower or None."""


@dataclass(frozen=True)
class Base:
    """A base model on the CPU."""

    kind: Kind
    arch: dict[str, Any]
    preprocess: Preparation
    tower: dict[str, Tensor]
    """The weights of the image tower or text encoder, under its own names."""
    text: TextTower | None

    def config(self, classes: tuple[str, ...], *, keep_text: bool = False, frozen_head: bool = False) -> ModelConfig:
        """The config of its classifier over these classes."""
        return ModelConfig(
            kind=self.kind, arch=self.arch, preprocess=self.preprocess, classes=classes, keep_text=keep_text, frozen_head=frozen_head
        )

    def state(self, config: ModelConfig) -> dict[str, Tensor]:
        """The weights of a classifier of that config, less the head."""
        state = {f"body.{name}": tensor for name, tensor in self.tower.items()}
        if config.keep_text and self.text is not None:
            state |= {f"text.{name}": tensor for name, tensor in self.text.state_dict().items()}
        return state


def load_base(base: BaseSpec, *, seed: int = 0) -> Base:
    """The base model; random weights from the seed when the spec names none.

    Raises `ModelError` for an unknown architecture or tag (nearest names offered) and for weights of another shape.
    """
    kind, arch, preprocess = _described(base)
    torch.manual_seed(seed)
    tower, text = DOORS[kind].load(base, arch)
    return Base(kind, arch, preprocess, tower, text)


def require_known(base: BaseSpec) -> None:
    """Raises `ModelError` for an architecture or a tag that no library knows, with the nearest names. What lies elsewhere (a config of the
    user's own, an import, a hub) is looked at by whoever loads it."""
    if not is_uri(base.arch) and _kind(base) in ("open_clip", "timm"):
        _described(base)


def _described(base: BaseSpec) -> tuple[Kind, dict[str, Any], Preparation]:
    kind = _kind(base)
    arch, own = DOORS[kind].describe(base)
    if isinstance(own, Tokens):
        return kind, arch, own
    if base.preprocess and base.preprocess.size != own.size:
        raise ModelError(
            f"`{base.arch}` takes {own.size} x {own.size} pixels, `preprocess` says {base.preprocess.size}; write `size: {own.size}`."
        )
    return kind, arch, base.preprocess or own


def _kind(base: BaseSpec) -> Kind:
    if base.arch.startswith(TEXT_PREFIX):
        return "transformers"
    if base.arch.startswith(timm_towers.PREFIX):
        return "timm"
    return "imported" if ":" in base.arch and not is_uri(base.arch) else "open_clip"
