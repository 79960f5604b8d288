"""What a model says about every sample of a split, and how often it is right, as exact counts. Knows tensors; knows no storage.

Pixels come in as uint8 and are normalised on the device that computes: (x / 255 - mean) / std.
"""

# N samples, B batch, C classes, H height, W width

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from stockpot.config import Preprocess
from stockpot.outcomes import Accuracy


def normalise(images_B3HW: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 images to float32 model input, on their own device."""
    mean = torch.tensor(preprocess.mean, device=images_B3HW.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(preprocess.std, device=images_B3HW.device).view(1, 3, 1, 1) * 255
    return (images_B3HW.float() - mean) / std


def logits(
    model: nn.Module, images_N3HW: np.ndarray | Tensor, preprocess: Preprocess, *, batch_size: int = 256, device: str | torch.device = "cpu"
) -> Tensor:
    """The model's logits for every image, in order: float32 (N, C) on the CPU.

    The model is put in evaluation mode, and back. One fixed batch size gives one fixed result: only the last batch is smaller.
    """
    return _in_batches(model, model, images_N3HW, preprocess, batch_size=batch_size, device=device)


def features(
    model: nn.Module, images_N3HW: np.ndarray | Tensor, preprocess: Preprocess, *, batch_size: int = 256, device: str | torch.device = "cpu"
) -> Tensor:
    """What the model's head sees (its `features` method) for every image, in order: float32 (N, D) on the CPU."""
    return _in_batches(model, model.features, images_N3HW, preprocess, batch_size=batch_size, device=device)  # type: ignore[arg-type]


@torch.inference_mode()
def _in_batches(
    model: nn.Module,
    function: Callable[[Tensor], Tensor],
    images_N3HW: np.ndarray | Tensor,
    preprocess: Preprocess,
    *,
    batch_size: int,
    device: str | torch.device,
) -> Tensor:
    was_training = model.training
    model.to(device).eval()
    rows = []
    for start in range(0, len(images_N3HW), batch_size):
        part = images_N3HW[start : start + batch_size]
        images_B3HW = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
        rows.append(function(normalise(images_B3HW.to(device), preprocess)).float().cpu())
    model.train(was_training)
    return torch.cat(rows)


def accuracy(logits_NC: Tensor, labels_N: np.ndarray | Tensor) -> Accuracy:
    """Top-1 accuracy as counts; the first of equal logits is the answer, as in `argmax`."""
    labels = torch.as_tensor(np.asarray(labels_N))
    if len(labels) != len(logits_NC):
        raise ValueError(f"{len(logits_NC)} rows of logits for {len(labels)} labels")
    return Accuracy(correct=int((logits_NC.argmax(dim=1) == labels).sum()), seen=len(labels))
