"""What a trial's options cost in time, over plain steps of the same model on the same batch in memory. In a round each has one step, in
another order every time; ratios are of one round, the figure is their median, the spread their quartiles.

`train.overhead_*` of a moving average, SAM, micro-batches and bf16: seconds of a step over those of a plain one, in CPU time.
`train.overhead_evaluation`: one evaluation on `IMAGES` images in memory, in plain steps of `BATCH` images, the best weights kept.
`train.overhead_saving`: one training state, checked, written, hashed, uploaded to SeaweedFS on loopback and entered into the journal, in
plain steps on the clock, with its bytes and seconds; a trial saves one every `state_interval_s` (300 s).
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn

from benchmarks._ground import opened_trials
from benchmarks._measuring import timed as clocked
from benchmarks.train import ARCH, BATCH, PREPROCESS, SETTINGS, batches, model
from stockpot.evaluation import accuracy, logits
from stockpot.outcomes import Accuracy
from stockpot.settings import TrialSettings
from stockpot.training.attempts import Attempt
from stockpot.training.candidates import Best
from stockpot.training.moving_parts import Training
from stockpot.training.trainer import evaluate

ROUNDS, SAVES, IMAGES = 40, 5, 256
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "moving_average": {"ema_decays": (0.999,)},
    "sam": {"sam_rho": 0.05},
    "micro_batches": {"micro_batch": BATCH // 4},
    "bf16": {"precision": "bf16"},
}
STEP = "times the seconds of a plain step"
PEERS = {
    "moving_average": (STEP, "a plain step; the average is of every weight, in float64, after every step"),
    "sam": (STEP, "a plain step; it has two forward and backward passes"),
    "micro_batches": (STEP, f"a plain step of {BATCH} images at once; here they are four times {BATCH // 4}"),
    "bf16": (STEP, "a plain step in fp32; on a CPU without bf16 arithmetic autocast only adds conversions"),
    "evaluation": (f"plain steps of {BATCH} images per evaluation of {IMAGES}", "a plain step: forward, backward and update"),
}


def measure(rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Every figure by its name in the bench file."""
    torch.set_num_threads(1)
    jobs = {name: stepping(more) for name, more in VARIANTS.items()} | {"evaluation": evaluating()}
    for job in jobs.values():
        job()
        job()
    names = list(jobs)
    seconds = [
        {name: timed(jobs[name]) for name in names[number % len(names) :] + names[: number % len(names)]} for number in range(rounds)
    ]
    found = {name: entry([one[name] / one["plain"] for one in seconds], *PEERS[name]) for name in PEERS}
    return {f"train.overhead_{name}": one for name, one in {**found, "saving": saving(SAVES)}.items()}


def timed(job: Callable[[], object]) -> float:
    """CPU seconds of all threads."""
    began = time.process_time()
    job()
    return time.process_time() - began


def stepping(more: dict[str, Any]) -> Callable[[], object]:
    """One step of a training of its own."""
    training = Training(model(), TrialSettings.model_validate({**SETTINGS.model_dump(), **more}), PREPROCESS)
    return partial(training.advance, next(batches(0)), 1e-4)


def evaluating() -> Callable[[], object]:
    """One evaluation, as the trainer does it on the way, of weights that are the best so far."""
    training = Training(model(), SETTINGS, PREPROCESS)
    return lambda: evaluate(training, Best(), score, lambda _metrics, _step: None)


def entry(ratios: list[float], unit: str, peer: str) -> dict[str, Any]:
    """A figure of one ratio a round."""
    first, middle, third = statistics.quantiles(ratios, n=4)
    return {"ratio": middle, "unit": unit, "peer": peer, "repeats": len(ratios), "spread": [first, third]}


def score(net: nn.Module) -> Accuracy:
    """Accuracy on black held_out images."""
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
