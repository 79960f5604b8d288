"""A training so small that every step can be looked at: its model, its batches, and what it comes to."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stockpot.evaluation import normalise
from stockpot.outcomes import Accuracy
from stockpot.preparation import Preprocess
from stockpot.settings import TrialSettings
from stockpot.training.candidates import Candidate
from stockpot.training.trainer import train

PREPROCESS = Preprocess(size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
STEPS_PER_EPOCH = 5


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor


def tiny() -> nn.Module:
    """BatchNorm and dropout on purpose: buffers and random masks must come back too."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def batches(epoch: int, skip: int = 0) -> Iterator[Batch]:
    for step in range(skip, STEPS_PER_EPOCH):
        rng = np.random.default_rng([epoch, step])
        labels = rng.integers(0, 3, 12)
        images = rng.integers(0, 150, (12, 3, 8, 8))
        images[np.arange(12), labels] += 60
        yield Batch(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels))


def score(model: nn.Module) -> Accuracy:
    """Right answers among ten batches that no step trains on."""
    model.eval()
    pairs = [(normalise(one.images, PREPROCESS), one.labels) for epoch in (98, 99) for one in batches(epoch)]
    with torch.inference_mode():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in pairs)
    model.train()
    return Accuracy(correct=right, seen=120)


def run(settings: TrialSettings, **kwargs) -> dict[float, Candidate]:
    """The candidates of a trial."""
    return train(tiny(), settings, batches, steps_per_epoch=STEPS_PER_EPOCH, preprocess=PREPROCESS, **{"score": score, **kwargs})


def equal(one: dict[float, Candidate], other: dict[float, Candidate]) -> bool:
    return one.keys() == other.keys() and all(
        one[decay].step == other[decay].step
        and all(torch.equal(tensor, other[decay].weights[name]) for name, tensor in one[decay].weights.items())
        for decay in one
    )
