"""What the trainer costs over the loop a specialist would write, on the same model and batches in memory, and where a trial's start goes.

`train.step_vs_bare`: steps per second of `stockpot.training.trainer.train`, all logging on, moving average off, over a bare PyTorch loop
(normalise, forward, cross-entropy, backward, clip, fused AdamW, cosine). The two alternate; a ratio is taken per pair,
the median is reported.
`train.start_up`: seconds of CPU from a process' start to its first step, in the named parts.
`train.concurrent`: steps per second of N trials at once, over those of one alone; the machine has the cores that the entry names.
`train.memory_*`: what a moving average, SAM and evaluation add to the peak memory of a trial, in copies of its weights. Plain AdamW holds
four (weights, gradients, two moments) and activations; each figure is of processes of their own, on a model of 300 MB.
"""

import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from stockpot.evaluation import accuracy, logits
from stockpot.models.classifier import ModelConfig, build
from stockpot.outcomes import Accuracy
from stockpot.preparation import Preprocess
from stockpot.settings import TrialSettings
from stockpot.training.trainer import train

STEPS, PAIRS, BATCH = 20, 11, 16
PREPROCESS = Preprocess(size=64, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
SMALL = PREPROCESS.model_copy(update={"size": 32})
ARCH = {"embed_dim": 128, "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 4, "head_width": 64}}
SETTINGS = TrialSettings(epochs=1, batch_size=BATCH, learning_rate=1e-4, warmup_steps=4)
START = """
import json, time
parts, began = {}, [time.process_time()]
def part(name):
    now = time.process_time(); parts[name] = now - began[0]; began[0] = now
parts["python"] = began[0]
import torch; part("torch")
import stockpot.models; part("open_clip, timm and torchvision")
import stockpot.data.shards; part("data plane")
import stockpot.ledger.tracking; part("mlflow")
import stockpot.training.trials; part("the rest of a trial")
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]); part("optimiser")
from benchmarks.train import SETTINGS, batches, model, PREPROCESS
from stockpot.outcomes import Accuracy
from stockpot.training.trainer import train
train(model(), SETTINGS.model_copy(update={"max_steps": 1}), batches, steps_per_epoch=1, preprocess=PREPROCESS)
part("model and first step")
print(json.dumps(parts))
"""


PEAK = """
import resource, sys
import torch
from benchmarks import train
torch.set_num_threads(2)
train.fat_trial(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
FAT = {"embed_dim": 64, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 1024, "layers": 6, "head_width": 64}}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "moving_average": {"ema_decays": (0.999,)},
    "sam": {"sam_rho": 0.05},
    "evaluation": {"evaluate_every_steps": 1},
}


class Batch(NamedTuple):
    """What a reader yields."""

    images: Tensor
    labels: Tensor


def measure() -> dict[str, dict[str, Any]]:
    """Every figure by its name in the bench file."""
    torch.set_num_threads(1)
    ratios, seconds = [], []
    for _ in range(2):
        bare(model(), 5)
        ours(model(), 5)
    for number in range(PAIRS):
        pair = {}
        for run in (bare, ours) if number % 2 else (ours, bare):
            pair[run] = timed(run)
        ratios.append(pair[bare] / pair[ours])
        seconds.append(pair[bare] / STEPS)
    parts = start_up()
    return {
        "train.step_vs_bare": {
            "ratio": statistics.median(ratios),
            "unit": "steps per second over steps per second",
            "peer": "bare PyTorch loop, same model, batches in memory, one thread",
            "repeats": PAIRS,
            "spread": [min(ratios), max(ratios)],
            "bare_step_ms": 1000 * statistics.median(seconds),
        },
        "train.start_up": {
            "ratio": sum(parts.values()),
            "unit": "CPU seconds from process start to the first step",
            "peer": "import torch alone: " + format(parts["torch"], ".2f"),
            "repeats": 2,
            "spread": parts,
        },
        "train.concurrent": concurrent(),
        **memory(),
    }


def timed(run: Callable[[nn.Module, int], None]) -> float:
    """CPU seconds of `STEPS` steps: on a shared machine steadier than the clock on the wall."""
    net = model()
    began = time.process_time()
    run(net, STEPS)
    return time.process_time() - began


def model() -> nn.Module:
    """The same classifier every time."""
    torch.manual_seed(0)
    return build(ModelConfig(kind="open_clip", arch=ARCH, preprocess=PREPROCESS, classes=tuple("abcdefghij")))


def batches(_epoch: int, _skip: int = 0) -> Iterator[Batch]:
    """One batch of noise, again and again."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (BATCH, 3, 64, 64), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (BATCH,), generator=generator)
    for _ in range(STEPS):
        yield Batch(images, labels)


def ours(net: nn.Module, steps: int) -> None:
    """The trainer, with a log that keeps everything."""
    logged: list[tuple[int, dict[str, float]]] = []
    train(
        net,
        SETTINGS.model_copy(update={"max_steps": steps}),
        batches,
        steps_per_epoch=STEPS,
        preprocess=PREPROCESS,
        log=lambda metrics, step: logged.append((step, metrics)),
    )


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


def start_up() -> dict[str, float]:
    """CPU seconds of each part of a trial's start, the smaller of two processes."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", START], env=environ, stdout=subprocess.PIPE, check=True).stdout) for _ in range(3)
    ]
    return {name: round(min(run[name] for run in runs), 2) for name in runs[0]}


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
        ours(net, STEPS)
        done += STEPS
    with steps.get_lock():
        steps.value += done


def memory() -> dict[str, dict[str, Any]]:
    """Peak memory of each variant over the plain one's, in copies of the weights."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in fat_model().parameters())
    peaks = {
        name: min(
            int(subprocess.run([sys.executable, "-c", PEAK, name], stdout=subprocess.PIPE, check=True).stdout.split()[-1]) for _ in range(2)
        )
        for name in VARIANTS
    }
    peers = {
        "moving_average": "plain AdamW; two more copies are the average itself, which is float64",
        "sam": "plain AdamW; one more copy is the weights to come back to",
        "evaluation": "plain AdamW; one more copy is the best weights so far, kept on the CPU. A copy of the optimiser would be two",
    }
    return {
        f"train.memory_{name}": {
            "ratio": (peaks[name] - peaks["plain"]) / weights,
            "unit": "copies of the weights added to the peak",
            "peer": peer,
            "repeats": 2,
            "spread": {"weights_mb": round(weights / 1e6), "plain_mb": round(peaks["plain"] / 1e6), "peak_mb": round(peaks[name] / 1e6)},
        }
        for name, peer in peers.items()
    }


def fat_model() -> nn.Module:
    """Much weight, little activation: what is held twice shows."""
    torch.manual_seed(0)
    return build(ModelConfig(kind="open_clip", arch=FAT, preprocess=SMALL, classes=tuple("abcdefghij")))


def fat_trial(variant: str) -> None:
    """Three steps of the fat model with one of `VARIANTS`."""
    settings = TrialSettings.model_validate({**SETTINGS.model_dump(), "max_steps": 3, **VARIANTS[variant]})
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (4,))

    def score(net: nn.Module) -> Accuracy:
        return accuracy(logits(net, images, SMALL), labels)

    batch = Batch(images, labels)
    train(fat_model(), settings, lambda _epoch, _skip: iter([batch] * 3), steps_per_epoch=3, preprocess=SMALL, score=score)
