"""The training loop of one trial, on one device. Values in, weights out: batches, a log and a checkpoint are arguments.

Every step draws its randomness (mixing, dropout) from (trial seed, step) alone, and the rate is a function of the step. So a training
state is weights, moments and a step number, and a trial resumed from it repeats the rest exactly.
"""

# B batch, C classes, H height, W width

import random
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from stockpot.checkpoints import first_non_finite
from stockpot.config import Preprocess, TrialSettings
from stockpot.errors import NonFinite, TrialFailed
from stockpot.evaluation import normalise
from stockpot.training import optimisation
from stockpot.training.losses import loss_function, mix

LOG_EVERY_STEPS = 10

State = dict[str, Tensor]
"""A training state: `step`, `model.*`, `optimiser.<parameter>.*` and, with a moving average, `ema.*`."""


class Batch(Protocol):
    """One training batch: images uint8 (B, 3, H, W), labels int64 (B)."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


Batches = Callable[[int, int], Iterable[Batch]]
"""(epoch from 0, batches to leave out at its start) to the epoch's batches."""

Log = Callable[[dict[str, float], int], None]
"""Metrics of the steps since the last call, and the number of steps done."""

Checkpoint = Callable[[int, Callable[[], State]], None]
"""Called after every step with the number of steps done and a function that gives the state; whoever keeps states decides when."""


def total_steps(settings: TrialSettings, steps_per_epoch: int) -> int:
    """Optimiser steps of the whole trial."""
    return min(settings.max_steps or settings.epochs * steps_per_epoch, settings.epochs * steps_per_epoch)


def train(
    model: nn.Module,
    settings: TrialSettings,
    batches: Batches,
    *,
    steps_per_epoch: int,
    preprocess: Preprocess,
    device: str | torch.device = "cpu",
    log: Log = lambda _metrics, _step: None,
    resume: State | None = None,
    checkpoint: Checkpoint = lambda _step, _state: None,
) -> None:
    """Fine-tune the model in place, from the start or from a state; with `ema_decay` it ends as its own moving average.

    Raises `NonFinite` with the step when the loss, and at the end when a weight, is no number; `TrialFailed` when memory runs out.
    """
    training = Training(model.to(device).train(), settings, preprocess)
    if resume is not None:
        training.restore(resume)
    total = total_steps(settings, steps_per_epoch)
    losses: list[Tensor] = []
    while training.step < total:
        epoch, skip = divmod(training.step, steps_per_epoch)
        for batch in islice(batches(epoch, skip), total - training.step):
            rate = optimisation.learning_rate(settings, training.step, total)
            losses.append(training.advance(batch, rate))
            step = training.step
            if step % LOG_EVERY_STEPS == 0 or step == total:
                log({"train/loss": _mean_loss(losses, step), "train/learning_rate": rate, "train/epoch": step / steps_per_epoch}, step)
                losses.clear()
            checkpoint(step, training.state)
    training.finish()
    name = first_non_finite(model.state_dict())
    if name is not None:
        raise NonFinite(f"Weights stopped being numbers by step {total}: `{name}`. Lower `learning_rate` {settings.learning_rate:g}.")


class Training:
    """The moving parts of a trial: weights, optimiser, moving average, step."""

    def __init__(self, model: nn.Module, settings: TrialSettings, preprocess: Preprocess) -> None:
        self.model, self.settings, self.preprocess = model, settings, preprocess
        self.device = next(model.parameters()).device
        self.rule = optimisation.optimiser(model, settings)
        self.loss = loss_function(settings)
        self.ema = {name: tensor.clone() for name, tensor in _floats(model).items()} if settings.ema_decay else {}
        self.step = 0

    def advance(self, batch: Batch, rate: float) -> Tensor:
        """One optimiser step; returns its loss, still on the device."""
        settings = self.settings
        rng = random.Random(f"{settings.seed}/{self.step}")
        torch.manual_seed(rng.getrandbits(63))
        images_B3HW = normalise(batch.images.to(self.device, non_blocking=True), self.preprocess)
        labels_B = batch.labels.to(self.device, non_blocking=True)
        images_B3HW, share = mix(images_B3HW, settings, rng)
        loss = self._gradients(images_B3HW, labels_B, share)
        if settings.sam_rho > 0:
            before = optimisation.climb(self.model, settings.sam_rho)
            self._gradients(images_B3HW, labels_B, share)
            optimisation.descend(before)
        if settings.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        optimisation.set_learning_rate(self.rule, rate)
        self.rule.step()
        self.step += 1
        self._average()
        return loss

    def _gradients(self, images_B3HW: Tensor, labels_B: Tensor, share: float) -> Tensor:
        """Fresh gradients of the batch's mean loss, in as many forward passes as `micro_batch` asks for; returns that loss."""
        self.rule.zero_grad(set_to_none=True)
        size, partners_B = len(labels_B), labels_B.flip(0)
        piece = self.settings.micro_batch or size
        total = torch.zeros((), device=self.device)
        try:
            for start in range(0, size, piece):
                part = slice(start, start + piece)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
                    logits_BC = self.model(images_B3HW[part])
                loss = self.loss(logits_BC.float(), labels_B[part], partners_B[part], share) * (len(logits_BC) / size)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        except torch.OutOfMemoryError as error:
            raise TrialFailed(
                f"The device ran out of memory at step {self.step + 1} with {min(piece, size)} images a forward pass. "
                f"Set `micro_batch` to {max(1, min(piece, size) // 2)}: the batch of {size}, and the result, stay the same."
            ) from error
        return total

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema:
            current = _floats(self.model)
            torch._foreach_lerp_(list(self.ema.values()), [current[name] for name in self.ema], 1 - self.settings.ema_decay)

    def state(self) -> State:
        """Everything a further attempt needs, as tensors: no pickle is ever written."""
        moments = {
            f"optimiser.{number}.{name}": tensor
            for number, values in self.rule.state_dict()["state"].items()
            for name, tensor in values.items()
            if tensor is not None
        }
        weights = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return {"step": torch.tensor(self.step), **weights, **moments, **{f"ema.{name}": tensor for name, tensor in self.ema.items()}}

    def restore(self, state: State) -> None:
        """Go back to a state."""
        self.step = int(state["step"])
        self.model.load_state_dict(_below(state, "model."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(state, "optimiser.").items():
            number, _, key = name.partition(".")
            moments.setdefault(int(number), {})[key] = tensor
        self.rule.load_state_dict({"state": moments, "param_groups": self.rule.state_dict()["param_groups"]})
        for name, tensor in _below(state, "ema.").items():
            self.ema[name].copy_(tensor)

    def finish(self) -> None:
        """The moving average, where there is one, becomes the model's weights."""
        if self.ema:
            self.model.load_state_dict(self.ema, strict=False)


def _floats(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def _below(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _mean_loss(losses: list[Tensor], step: int) -> float:
    """The mean of the last losses; one read from the device for all of them."""
    values = torch.stack(losses).cpu()
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        first = step - len(losses) + int((~finite).nonzero()[0]) + 1
        raise NonFinite(f"The loss stopped being a number at step {first}. Lower the learning rate or clip harder.")
    return float(values.mean())
