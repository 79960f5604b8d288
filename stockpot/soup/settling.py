"""Estimating BatchNorm statistics again, where a request asks for it (`batch_norm_samples`): on which training samples, prepared as for
evaluation, and doing it. Soups and single models are treated alike; `recipes.batch_norm` says what it may ruin.
"""

# B batch, S side in pixels

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from stockpot.config import Sweep
from stockpot.data.shards import TrainReader
from stockpot.data.snapshots import open_snapshot
from stockpot.evaluation import normalise
from stockpot.models.classifier import Classifier
from stockpot.preparation import Preparation
from stockpot.soup.recipes.batch_norm import reestimate

BATCH = 64
"""Samples that BatchNorm sees together, where train has as many; a last batch that is not full is left out."""


def settling_samples(sweep: Sweep, preprocess: Preparation) -> tuple[Tensor, ...]:
    """The first `batch_norm_samples` training samples of epoch 0 in the order of seed 0, on any machine: batches uint8 (B, 3, S, S),
    without those that are unreadable and that the request allows to be. None where the request does not ask for it."""
    count = sweep.request.soup.batch_norm_samples
    if count is None:
        return ()
    snapshot, data = open_snapshot(sweep.data.snapshot), sweep.request.data
    size = min(BATCH, snapshot.counts["train"])
    reader = TrainReader(
        snapshot, preprocess=preprocess, augment=None, batch_size=size, seed=0, drop_last=True, skip_fraction=data.skip_fraction,
        reading=data.reading,
    )  # fmt: skip
    return tuple(batch.images for batch in islice(reader.batches(0), count // size))


def settle(model: Classifier, batches: Sequence[Tensor], device: str | torch.device = "cpu") -> None:
    """Estimate the model's statistics on these batches, on its device; without any, leave them as they are."""
    if batches:
        reestimate(model, (normalise(images.to(device), model.config.preprocess) for images in batches))
