"""The training loop of one trial, on one device or as one of several ranks. Values in, weights out: batches, a log, a score and a
checkpoint are arguments.

The rate is a function of the step and so is every random draw. So a training state is tensors and a step number (`moving_parts`), and a
trial resumed from it repeats the rest exactly.
"""

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor, distributed, nn

from stockpot.errors import NonFinite
from stockpot.preparation import Preparation
from stockpot.settings import TrialSettings
from stockpot.training import optimisation
from stockpot.training.candidates import Best, Candidate, Checkpoint, Score, State, Weights, on_cpu
from stockpot.training.fitting import gigabytes, room_for
from stockpot.training.moving_parts import Batch, Training, require_finite
from stockpot.training.sharding import Shards

__all__ = ["Batch", "Batches", "Checkpoint", "Log", "State", "total_steps", "train"]

LOG_EVERY_STEPS = 10
IN_EVALUATION = room_for(
    "an evaluation beside what training holds",
    "Leave `evaluate_every_steps` out: the last weights are evaluated when the optimiser's memory is free again.",
)

Batches = Callable[[int, int], Iterable[Batch]]
"""(epoch from 0, batches to leave out at its start) to the epoch's batches."""

Log = Callable[[dict[str, float], int], None]
"""Metrics of the steps since the last call, and the number of steps done."""


def total_steps(settings: TrialSettings, steps_per_epoch: int) -> int:
    """Optimiser steps of the whole trial."""
    return settings.epochs * steps_per_epoch if settings.max_steps is None else settings.max_steps


def train(
    model: nn.Module,
    settings: TrialSettings,
    batches: Batches,
    *,
    steps_per_epoch: int,
    preprocess: Preparation,
    device: str | torch.device = "cpu",
    log: Log = lambda _metrics, _step: None,
    resume: State | None = None,
    checkpoint: Checkpoint = lambda _step, _state: None,
    score: Score | None = None,
    rank: int = 0,
    world: int = 1,
    sharded: bool = False,
) -> dict[float, Candidate]:
    """Fine-tune the model in place, from the start or from a state. Returns its candidates by decay of their average: 0 is the weights
    themselves, and the model ends with them.

    score: asked every `evaluate_every_steps`, whose best weights the candidates then are. rank, world: this process among those that train
    together (`ranks`); its batches are its shares. sharded: they share the model too (`sharding`). Raises `NonFinite` with the step when
    the loss or a weight is no number, `TrialFailed` when memory runs out, `BadRequest` for `frozen` names that the model does not have.
    """
    with room_for(f"the model, {gigabytes(model.parameters())} of weights", "Use a device with more memory, or a smaller model.")():
        optimisation.freeze(model, settings.frozen)  # before it is cut: a number that stays as it is may stay whole
        shards = Shards(model, device) if sharded else None
        model.to(device).train()
    training = Training(model, settings, preprocess, rank=rank, world=world, shards=shards)
    checkpoint = shards.agreed(checkpoint) if shards else checkpoint
    best = Best()
    if resume is not None:
        training.restore(resume)
        best.restore(resume, (0.0, *settings.ema_decays))
    total = total_steps(settings, steps_per_epoch)
    losses: list[Tensor] = []
    while training.step < total:
        epoch, skip = divmod(training.step, steps_per_epoch)
        for batch in islice(batches(epoch, skip), total - training.step):
            rate = optimisation.learning_rate(settings, training.step, total)
            losses.append(training.advance(batch, rate))
            step = training.step
            if step % LOG_EVERY_STEPS == 0 or step == total:
                log(
                    {"train/loss": _mean_loss(losses, step, world), "train/learning_rate": rate, "train/epoch": step / steps_per_epoch},
                    step,
                )
                losses.clear()
            if (score or shards) and settings.evaluate_every_steps and (step % settings.evaluate_every_steps == 0 or step == total):
                evaluate(training, best, score, log)
            checkpoint(step, lambda: training.state() | best.state())
    training.end()
    return _finish(training, best)


def evaluate(training: Training, best: Best, score: Score | None, log: Log) -> None:
    """Score the weights and every average of them, and keep what is the best so far; a rank without a score gives its shares."""
    for decay, average in {0.0: Weights(), **training.averages.averages}.items():
        with IN_EVALUATION(), training.wearing(average) as model:
            if score is None:
                continue
            accuracy = score(model)
            best.offer(decay, training.step, accuracy.correct, model)
        log({f"held_out/accuracy-ema-{decay!r}" if decay else "held_out/accuracy": accuracy.value}, training.step)


def _finish(training: Training, best: Best) -> dict[float, Candidate]:
    """The candidates, all of numbers, and the first of them in the model; none on a rank that only gives its shares."""
    candidates: dict[float, Candidate] = {}
    for decay, average in {0.0: Weights(), **training.averages.averages}.items():
        with training.wearing(average) as model:
            if training.sees_whole:
                require_finite(model.state_dict(), training.step, training.settings)
                candidates[decay] = best.found.get(decay) or Candidate(on_cpu(model), training.step)
    if 0.0 in best.found:
        training.load(best.found[0.0].weights)
    return candidates


def _mean_loss(losses: list[Tensor], step: int, world: int) -> float:
    """The mean of the last losses, over all ranks; one read from the device for all of them."""
    values = torch.stack(losses)
    if world > 1:
        distributed.all_reduce(values)
    values = (values / world).cpu()
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        first = step - len(losses) + int((~finite).nonzero()[0]) + 1
        raise NonFinite(f"The loss stopped being a number at step {first}. Lower the learning rate or clip harder.")
    return float(values.mean())
