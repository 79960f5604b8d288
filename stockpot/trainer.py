"""The training loop of one trial, on one device. Values in, weights out: batches, a log and a stop sign are arguments.

Every step draws its randomness (mixup, dropout) from (trial seed, step) alone. So a step is a function of the state before it and
of its batch, and a resumed trial repeats the rest exactly.
"""

# B batch, C classes, H height, W width

import random
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from stockpot import optimisation
from stockpot.checkpoints import first_non_finite
from stockpot.config import Preprocess, TrialSettings
from stockpot.errors import NonFinite
from stockpot.evaluation import normalise

LOG_EVERY_STEPS = 10


class Batch(Protocol):
    """One training batch: images uint8 (B, 3, H, W), labels int64 (B)."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


Batches = Callable[[int], Iterable[Batch]]
"""Epoch, from 0, to its batches."""

Log = Callable[[dict[str, float], int], None]
"""Metrics of the steps since the last call, and the number of steps done."""


def train(
    model: nn.Module,
    settings: TrialSettings,
    batches: Batches,
    *,
    steps_per_epoch: int,
    preprocess: Preprocess,
    device: str | torch.device = "cpu",
    log: Log = lambda _metrics, _step: None,
) -> None:
    """Fine-tune the model in place for `settings.epochs` passes.

    Raises `NonFinite` with the step when the loss, and at the end when a weight, is no number.
    """
    total_steps = settings.epochs * steps_per_epoch
    model.to(device).train()
    rule = optimisation.optimiser(model, settings)
    losses: list[Tensor] = []
    step = 0
    for epoch in range(settings.epochs):
        for batch in batches(epoch):
            rate = optimisation.learning_rate(settings, step, total_steps)
            optimisation.set_learning_rate(rule, rate)
            losses.append(_step(model, rule, batch, step, settings=settings, preprocess=preprocess, device=device))
            step += 1
            if step % LOG_EVERY_STEPS == 0 or step == total_steps:
                log({"train/loss": _mean_loss(losses, step), "train/learning_rate": rate, "train/epoch": step / steps_per_epoch}, step)
                losses.clear()
    name = first_non_finite(model.state_dict())
    if name is not None:
        raise NonFinite(f"Weights stopped being numbers by step {step}: `{name}`. Lower `learning_rate` {settings.learning_rate:g}.")


def _step(
    model: nn.Module,
    rule: torch.optim.Optimizer,
    batch: Batch,
    step: int,
    *,
    settings: TrialSettings,
    preprocess: Preprocess,
    device: str | torch.device,
) -> Tensor:
    """One optimiser step; returns its loss, still on the device."""
    rng = random.Random(f"{settings.seed}/{step}")
    torch.manual_seed(rng.getrandbits(63))
    images_B3HW = normalise(batch.images.to(device, non_blocking=True), preprocess)
    labels_B = batch.labels.to(device, non_blocking=True)
    share = rng.betavariate(settings.mixup, settings.mixup) if settings.mixup > 0 else 1.0
    if share < 1:
        images_B3HW = share * images_B3HW + (1 - share) * images_B3HW.flip(0)
    loss = cross_entropy(model(images_B3HW), labels_B, share=share, smoothing=settings.label_smoothing)
    rule.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if settings.clip_norm > 0:
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    rule.step()
    return loss.detach()


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, *, share: float = 1.0, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy. With mixup (Zhang et al. 2018, arXiv:1710.09412), `share` belongs to the label and the rest to the label of
    the batch's mirror image, the partner it was mixed with."""
    loss = functional.cross_entropy(logits_BC, labels_B, label_smoothing=smoothing)
    if share < 1:
        loss = share * loss + (1 - share) * functional.cross_entropy(logits_BC, labels_B.flip(0), label_smoothing=smoothing)
    return loss


def _mean_loss(losses: list[Tensor], step: int) -> float:
    """The mean of the last losses; one read from the device for all of them."""
    values = torch.stack(losses).cpu()
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        first = step - len(losses) + int((~finite).nonzero()[0]) + 1
        raise NonFinite(f"The loss stopped being a number at step {first}. Lower the learning rate or clip harder.")
    return float(values.mean())
