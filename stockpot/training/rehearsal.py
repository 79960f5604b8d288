"""What can be known to fail before a GPU is taken: settings that the init's model, or this library, has no name for.

A loss or augmentation of the user's own (`package.module:name`) is looked up where its package is installed here. Where it is not, nothing
can be known: it has to be installed where trials run, which may be elsewhere. (A backbone of one's own builds the init, so it always is.)
"""

from importlib.util import find_spec

import torch

from stockpot.config import PinnedData, SweepSpec
from stockpot.data.snapshots import open_snapshot
from stockpot.errors import BadRequest
from stockpot.models.classifier import ModelConfig, build
from stockpot.preparation import Preparation, Preprocess
from stockpot.sweeps import draw
from stockpot.training.augmentation import augmentation
from stockpot.training.losses import loss_function, require_mixable
from stockpot.training.optimisation import frozen_names, require_layers
from stockpot.training.sharding import require_divisible

DRAWS = 64
"""Times an augmentation is tried on a small picture: operations are drawn, so once is not enough."""


def rehearse(spec: SweepSpec, config: ModelConfig, *, sharded: bool = False) -> None:
    """Name everything the sweep's trials will name of a model with this config. Raises `BadRequest` for what there is not, and for a model
    that GPUs cannot share."""
    drawn = draw(spec)
    patterns = {settings.frozen for settings in drawn}
    by_layer = any(settings.layer_decay < 1 for settings in drawn)
    if patterns != {()} or by_layer or sharded:
        model = build(config)
        for frozen in sorted(patterns):
            kept = frozen_names(model, frozen)
            if sharded:
                require_divisible(model, kept)
        if by_layer:
            require_layers(model)
    for settings in drawn:
        require_mixable(settings, config.preprocess)
    for name in sorted({name for one in drawn for name in (one.augmentation, one.last_epoch_augmentation) if name and _is_here(name)}):
        _require_applicable(name, config.preprocess)
    for settings in {one.loss: one for one in drawn if _is_here(one.loss)}.values():
        loss_function(settings)


def require_same_classes(data: PinnedData) -> None:
    """Raises `SnapshotBroken` for a test or shift snapshot whose classes are not those of the training data."""
    classes = open_snapshot(data.snapshot).classes
    for pinned in filter(None, (data.test, *data.shifts.values())):
        open_snapshot(pinned).require_classes(classes)


def _require_applicable(name: str, preprocess: Preparation) -> None:
    """Raises `BadRequest` for an augmentation that does not exist; or one of timm's that it cannot carry out, as it says of some
    magnitudes only when it draws the operation they are too much for."""
    if isinstance(preprocess, Preprocess) and ":" not in name:
        preprocess = preprocess.model_copy(update={"size": 16})  # quick
    made = augmentation(name, preprocess)
    if made is None or ":" in name:
        return
    picture_3HW = torch.randint(256, (3, 24, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    try:
        for seed in range(DRAWS):
            made(picture_3HW, seed)
    except ValueError as error:
        raise BadRequest(f"The augmentation `{name}` fails when it is applied ({error}); take other numbers in it.") from error


def _is_here(name: str) -> bool:
    """Whether it can be known here what the name stands for."""
    module, separator, _ = name.partition(":")
    package = module.partition(".")[0]
    return not separator or not package or find_spec(package) is not None
