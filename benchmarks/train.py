"""What the trainer costs over the loop a specialist would write, on the same model and batches in memory.

`train.step_vs_bare`: steps per second of `stockpot.training.trainer.train`, logging all that a trial logs, moving average off, over a bare
PyTorch loop (normalise, forward, cross-entropy, backward, clip, fused AdamW, cosine). What a trial logs: metrics to a real MLflow through
the spool, system metrics, and its lines to a real Prefect. The two alternate; a ratio is taken per pair, the median is reported.
`train.concurrent`: steps per second of N trials at once, over those of one alone; the machine has the cores that the entry names.

What its options cost is in `train_overhead`, what they hold in `train_memory`, where a trial's start goes in `train_start`.
"""

import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from prefect import flow, get_run_logger
from torch import Tensor, nn
from torch.nn import functional

from benchmarks._ground import opened_trials
from stockpot.config import Trial
from stockpot.ledger.trial_log import TrialLog
from stockpot.models.classifier import ModelConfig, build
from stockpot.preparation import Preprocess
from stockpot.settings import TrialSettings
from stockpot.training.trainer import Log, train
from stockpot.training.trials import _note

STEPS, PAIRS, BATCH = 60, 7, 16
PREPROCESS = Preprocess(size=64, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
ARCH = {"embed_dim": 128, "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 4, "head_width": 64}}
SETTINGS = TrialSettings(epochs=1, batch_size=BATCH, learning_rate=1e-4, warmup_steps=4)


class Batch(NamedTuple):
    """What a reader yields."""

    images: Tensor
    labels: Tensor


class Seconds(NamedTuple):
    """How long a run took: `cpu` counts all threads of the process, and is steadier on a shared machine."""

    cpu: float
    clock: float


def measure(steps: int = STEPS, pairs: int = PAIRS) -> dict[str, dict[str, Any]]:
    """Every figure by its name in the bench file."""
    torch.set_num_threads(1)
    with opened_trials(1, ARCH, SETTINGS) as (trial,):
        found = alternating(trial, steps, pairs)
    ratios = [pair["bare"].cpu / pair["ours"].cpu for pair in found]
    return {
        "train.step_vs_bare": {
            "ratio": statistics.median(ratios),
            "unit": "steps per second over steps per second, in CPU time of all threads",
            "peer": "bare PyTorch loop, same model, batches in memory, one thread",
            "repeats": pairs,
            "spread": [min(ratios), max(ratios)],
            "on_the_clock": statistics.median(pair["bare"].clock / pair["ours"].clock for pair in found),
            "bare_step_ms": 1000 * statistics.median(pair["bare"].cpu for pair in found) / steps,
        },
        "train.concurrent": concurrent(),
    }


@flow(name="bench")
def alternating(trial: Trial, steps: int, pairs: int) -> list[dict[str, Seconds]]:
    """What so many steps of the bare loop and of ours took, pair by pair; opening and closing the trial's log is no part of a step."""
    say = get_run_logger().info

    def logged(count: int) -> Seconds:
        with TrialLog(trial, claim=1) as log:
            return timed(partial(ours, log=_note(trial, log, say)), count)

    loops = {"bare": partial(timed, bare), "ours": logged}
    for loop in loops.values():
        loop(5)
    return [{name: loops[name](steps) for name in sorted(loops, reverse=bool(number % 2))} for number in range(pairs)]


def timed(run: Callable[[nn.Module, int], None], steps: int) -> Seconds:
    """What so many steps take on a fresh model."""
    net = model()
    cpu, clock = time.process_time(), time.perf_counter()
    run(net, steps)
    return Seconds(time.process_time() - cpu, time.perf_counter() - clock)


def model() -> nn.Module:
    """The same classifier every time."""
    torch.manual_seed(0)
    return build(ModelConfig(kind="open_clip", arch=ARCH, preprocess=PREPROCESS, classes=tuple("abcdefghij")))


def batches(_epoch: int, _skip: int = 0) -> Iterator[Batch]:
    """One batch of noise, again and again."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (BATCH, 3, 64, 64), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (BATCH,), generator=generator)
    while True:
        yield Batch(images, labels)


def ours(net: nn.Module, steps: int, log: Log = lambda _metrics, _step: None) -> None:
    """The trainer."""
    settings = SETTINGS.model_copy(update={"max_steps": steps})
    train(net, settings, batches, steps_per_epoch=steps, preprocess=PREPROCESS, log=log)


def bare(net: nn.Module, steps: int) -> None:
    """What a specialist would write by hand."""
    mean = torch.tensor(PREPROCESS.mean).view(1, 3, 1, 1) * 255
    std = torch.tensor(PREPROCESS.std).view(1, 3, 1, 1) * 255
    net.train()
    rule = torch.optim.AdamW(net.parameters(), lr=SETTINGS.learning_rate, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for _, (images, labels) in zip(range(steps), batches(0), strict=False):
        loss = functional.cross_entropy(net((images.float() - mean) / std), labels)
        rule.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        rule.step()
        schedule.step()


def concurrent(counts: tuple[int, ...] = (1, 2, 4), seconds: float = 8.0) -> dict[str, Any]:
    """Steps per second of N trials in processes of their own, one thread each, over those of one."""
    rates = {count: _rate(count, seconds) for count in counts}
    cores = len(os.sched_getaffinity(0))
    return {
        "ratio": rates[cores if cores in rates else counts[-1]] / rates[counts[0]],
        "unit": f"times the steps per second of one trial, with as many trials as cores ({cores})",
        "peer": f"one trial alone; {cores} would be perfect",
        "repeats": 1,
        "spread": {str(count): round(rate / rates[counts[0]], 2) for count, rate in rates.items()},
    }


def _rate(count: int, seconds: float) -> float:
    context = multiprocessing.get_context("spawn")
    steps, ready = context.Value("i", 0), context.Barrier(count + 1)
    trials = [context.Process(target=_train_on, args=(steps, ready, seconds)) for _ in range(count)]
    for trial in trials:
        trial.start()
    ready.wait()
    began = time.monotonic()
    for trial in trials:
        trial.join()
    return float(steps.value) / (time.monotonic() - began)


def _train_on(steps: Any, ready: Any, seconds: float) -> None:
    """Train until the time is over and add the steps to the common count."""
    torch.set_num_threads(1)
    net = model()
    ours(net, 5)
    ready.wait()
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        ours(net, 20)
        done += 20
    with steps.get_lock():
        steps.value += done


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
