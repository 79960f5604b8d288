"""What a trial's options cost in time, over plain steps of the same model on the same batches in memory. In a round each has its turn;
ratios are of one round, the figure is their median, the spread their range.

`train.overhead_*` of a moving average, SAM, micro-batches and bf16: seconds of a step over those of a plain one, in CPU time.
`train.overhead_evaluation`: one evaluation on `IMAGES` images in memory, in plain steps of `BATCH` images, the best weights kept.
`train.overhead_saving`: one training state, checked, written, hashed, uploaded to SeaweedFS on loopback and entered into the journal, in
plain steps on the clock, with its bytes and seconds; a trial saves one every `state_interval_s` (300 s).
"""

import json
import statistics
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn

from benchmarks._ground import opened_trials
from benchmarks._measuring import timed as clocked
from benchmarks.train import ARCH, BATCH, PREPROCESS, SETTINGS, batches, model, timed
from stockpot.evaluation import accuracy, logits
from stockpot.outcomes import Accuracy
from stockpot.settings import TrialSettings
from stockpot.training.attempts import Attempt
from stockpot.training.moving_parts import Training
from stockpot.training.trainer import train

STEPS, ROUNDS, IMAGES, EVERY = 20, 5, 256, 5
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "moving_average": {"ema_decays": (0.999,)},
    "sam": {"sam_rho": 0.05},
    "micro_batches": {"micro_batch": BATCH // 4},
    "bf16": {"precision": "bf16"},
    "evaluation": {"evaluate_every_steps": EVERY},
}
STEP = {
    "moving_average": "a plain step; the average is of every weight, in float64, after every step",
    "sam": "a plain step; it has two forward and backward passes",
    "micro_batches": f"a plain step of {BATCH} images at once; here they are four times {BATCH // 4}",
    "bf16": "a plain step in fp32; on a CPU without bf16 arithmetic autocast only adds conversions",
}


def measure(rounds: int = ROUNDS, steps: int = STEPS) -> dict[str, dict[str, Any]]:
    """Every figure by its name in the bench file."""
    torch.set_num_threads(1)
    for name in VARIANTS:
        timed(partial(variant, name), 2)
    seconds = [{name: timed(partial(variant, name), steps).cpu for name in VARIANTS} for _ in range(rounds)]
    found = {name: entry([one[name] / one["plain"] for one in seconds], "times the seconds of a plain step", STEP[name]) for name in STEP}
    evaluations = [(one["evaluation"] / one["plain"] - 1) * steps / (steps // EVERY) for one in seconds]
    found["evaluation"] = entry(
        evaluations, f"plain steps of {BATCH} images per evaluation of {IMAGES}", "a plain step: forward, backward and update"
    )
    return {f"train.overhead_{name}": one for name, one in {**found, "saving": saving(rounds)}.items()}


def entry(ratios: list[float], unit: str, peer: str) -> dict[str, Any]:
    """A figure of one ratio a round."""
    return {"ratio": statistics.median(ratios), "unit": unit, "peer": peer, "repeats": len(ratios), "spread": [min(ratios), max(ratios)]}


def variant(name: str, net: nn.Module, steps: int) -> None:
    """So many steps of the trainer with one of `VARIANTS`."""
    settings = TrialSettings.model_validate({**SETTINGS.model_dump(), "max_steps": steps, **VARIANTS[name]})
    train(net, settings, batches, steps_per_epoch=steps, preprocess=PREPROCESS, score=score)


def score(net: nn.Module) -> Accuracy:
    """Accuracy on held_out images of noise."""
    images = torch.zeros((IMAGES, 3, 64, 64), dtype=torch.uint8)
    return accuracy(logits(net, images, PREPROCESS), torch.zeros(IMAGES, dtype=torch.int64))


def saving(rounds: int) -> dict[str, Any]:
    """Training states of a trial of its own, each after a step."""
    training, batch, numbers = Training(model(), SETTINGS, PREPROCESS), next(batches(0)), count(1)
    training.advance(batch, 1e-4)
    with opened_trials(1, ARCH, SETTINGS) as (trial,):
        hold = Attempt(trial)
        hold.save(next(numbers), training.state())
        pairs = [
            (clocked(lambda: hold.save(next(numbers), training.state())), clocked(lambda: training.advance(batch, 1e-4)))
            for _ in range(rounds)
        ]
    found = entry([save / step for save, step in pairs], "plain steps per saved state, on the clock", f"a plain step of {BATCH} images")
    stored = sum(tensor.numel() * tensor.element_size() for tensor in training.state().values())
    return {**found, "seconds": statistics.median(save for save, _ in pairs), "bytes": stored}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
