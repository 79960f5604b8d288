"""What a model says about every sample of a split, and how often it is right, as exact counts. Knows tensors; knows no storage.

Pixels come in as uint8 and are normalised on the device that computes: (x / 255 - mean) / std. Tokens come in as int32 and stay.
"""

# N samples, B batch, C classes, ... the shape of one input: 3, H, W of an image, L of tokens

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stockpot.fields import Metric
from stockpot.outcomes import Accuracy
from stockpot.preparation import Preparation, Tokens


class Ranks(NamedTuple):
    """This process among several that evaluate together."""

    rank: int
    world: int
    all_reduce: Callable[[Tensor], object]
    """Adds up a tensor of the model's device over all ranks, in place: `torch.distributed.all_reduce`."""


def share(samples: int, rank: int, world: int, batch_size: int) -> range:
    """The samples that one rank evaluates: whole batches of a lone evaluation, so that its results are the same to the last bit.

    All ranks together have every sample once and none twice; where there are fewer batches than ranks, the later ranks may have none.
    """
    batches = -(-samples // batch_size)
    first, last = (-(-batches * one // world) * batch_size for one in (rank, rank + 1))
    return range(min(first, samples), min(last, samples))


def normalise(images_B3HW: Tensor, preprocess: Preparation, room: Tensor | None = None) -> Tensor:
    """uint8 images to float32 model input, on their own device; tokens are input already. `room`: at least B images of float32 to write
    into, so that a loop over batches allocates nothing (on a CPU that takes longer than the arithmetic)."""
    if isinstance(preprocess, Tokens):
        return images_B3HW
    device = images_B3HW.device
    mean = torch.tensor(preprocess.mean, device=device).view(1, 3, 1, 1) * 255
    std = torch.tensor(preprocess.std, device=device).view(1, 3, 1, 1) * 255
    into = torch.empty(images_B3HW.shape, device=device) if room is None else room[: len(images_B3HW)]
    return into.copy_(images_B3HW).sub_(mean).div_(std)


def logits(
    model: nn.Module,
    inputs_N: np.ndarray | Tensor,
    preprocess: Preparation,
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    ranks: Ranks | None = None,
) -> Tensor:
    """The model's logits for every input, in order: float32 (N, C) on the CPU.

    The model is put in evaluation mode, and back. One fixed batch size gives one fixed result: only the last batch is smaller.
    With `ranks`, every rank calls this with all N inputs, computes its share, and gets the logits of all; raises `ValueError` unless each
    was evaluated exactly once.
    """
    if ranks is None:
        return _in_batches(model, model, inputs_N, preprocess, batch_size=batch_size, device=device)
    mine = share(len(inputs_N), ranks.rank, ranks.world, batch_size)
    own = inputs_N[mine.start : mine.stop]
    rows = _in_batches(model, model, own, preprocess, batch_size=batch_size, device=device) if mine else torch.empty(0, 0)
    return _together(rows, mine, len(inputs_N), ranks, device)


def _together(rows_MC: Tensor, mine: range, samples: int, ranks: Ranks, device: str | torch.device) -> Tensor:
    """All ranks' rows: each adds its own to zeros, with a one beside each row to count it. The first rank always has rows, so it says C."""
    width = torch.tensor([rows_MC.shape[1] if ranks.rank == 0 else 0], device=device)
    ranks.all_reduce(width)
    counted_NC = torch.zeros(samples, int(width) + 1, device=device)
    if mine:
        counted_NC[mine.start : mine.stop] = torch.cat([torch.ones(len(mine), 1), rows_MC], dim=1).to(device)
    ranks.all_reduce(counted_NC)
    if amiss := int((counted_NC[:, 0] != 1).sum()):
        raise ValueError(f"{amiss} of {samples} samples were not evaluated exactly once by the {ranks.world} ranks")
    return counted_NC[:, 1:].cpu().contiguous()


def features(
    model: nn.Module, inputs_N: np.ndarray | Tensor, preprocess: Preparation, *, batch_size: int = 256, device: str | torch.device = "cpu"
) -> Tensor:
    """What the model's head sees (its `features` method) for every input, in order: float32 (N, D) on the CPU."""
    # torch types every attribute of a Module as Tensor or Module, methods of subclasses too
    return _in_batches(model, model.features, inputs_N, preprocess, batch_size=batch_size, device=device)  # type: ignore[arg-type]


@torch.inference_mode()
def _in_batches(
    model: nn.Module,
    function: Callable[[Tensor], Tensor],
    inputs_N: np.ndarray | Tensor,
    preprocess: Preparation,
    *,
    batch_size: int,
    device: str | torch.device,
) -> Tensor:
    was_training = model.training
    model.to(device).eval()
    rows = []
    room = None if isinstance(preprocess, Tokens) else torch.empty((min(batch_size, len(inputs_N)), *inputs_N.shape[1:]), device=device)
    for start in range(0, len(inputs_N), batch_size):
        part = inputs_N[start : start + batch_size]
        inputs_B = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
        rows.append(function(normalise(inputs_B.to(device), preprocess, room)).to("cpu", torch.float32, copy=True))
    model.train(was_training)
    return torch.cat(rows)


def right(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Which samples a model gets right: bool (N,). The first of equal logits is the answer, and a row with a NaN has none."""
    return (logits_NC.argmax(dim=1) == labels_N) & ~logits_NC.isnan().any(dim=1)


def accuracy(logits_NC: Tensor, labels_N: np.ndarray | Tensor, metric: Metric = "accuracy") -> Accuracy:
    """Top-1 accuracy as counts, beside it another metric if one is asked for; the first of equal logits is the answer, as in `argmax`."""
    labels = torch.as_tensor(np.asarray(labels_N))
    if len(labels) != len(logits_NC):
        raise ValueError(f"{len(logits_NC)} rows of logits for {len(labels)} labels")
    hits = right(logits_NC, labels)
    counts = Accuracy(correct=int(hits.sum()), seen=len(labels))
    if metric == "accuracy":
        return counts
    classes = logits_NC.shape[1]
    answers = logits_NC.argmax(dim=1)[~logits_NC.isnan().any(dim=1)]
    true_C, told_C, right_C = (torch.bincount(one, minlength=classes).double() for one in (labels, answers, labels[hits]))
    return counts.model_copy(update={"other": round(float(OTHERS[metric](true_C, told_C, right_C)), 12)})


def macro_f1(true_C: Tensor, told_C: Tensor, right_C: Tensor) -> Tensor:
    """Mean F1 over the classes that occur among labels or answers, from each class's labels, answers and right answers (float64)."""
    both_C = true_C + told_C
    return (2 * right_C / both_C)[both_C > 0].mean()


def mcc(true_C: Tensor, told_C: Tensor, right_C: Tensor) -> Tensor:
    """Matthews correlation of many classes (Gorodkin 2004, R_K), in [-1, 1]; 0 where all labels or all answers are of one class."""
    seen = true_C.sum()
    spread = (seen**2 - told_C.square().sum()) * (seen**2 - true_C.square().sum())
    return (right_C.sum() * seen - true_C @ told_C) / spread.sqrt() if spread > 0 else torch.zeros(())


OTHERS: dict[Metric, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"macro_f1": macro_f1, "mcc": mcc}
"""Metrics beside accuracy. They are rounded to twelve digits, so that equals are equal whatever was summed first."""
