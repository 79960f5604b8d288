"""What the trainer costs over the loop a specialist would write, on the same model and batches in memory, and where a trial's start goes.

`train.step_vs_bare`: steps per second of `stockpot.training.trainer.train`, all logging on, moving average off, over a bare PyTorch loop
(normalise, forward, cross-entropy, backward, clip, fused AdamW, cosine). The two alternate; a ratio is taken per pair,
the median is reported.
`train.start_up`: seconds of CPU from a process' start to its first step, in the named parts.
"""

import json
import math
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

from stockpot.config import Preprocess, TrialSettings
from stockpot.models.classifier import ModelConfig, build
from stockpot.training.trainer import train

STEPS, PAIRS, BATCH = 20, 11, 16
PREPROCESS = Preprocess(size=64, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
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
from stockpot.training.trainer import train
train(model(), SETTINGS.model_copy(update={"max_steps": 1}), batches, steps_per_epoch=1, preprocess=PREPROCESS)
part("model and first step")
print(json.dumps(parts))
"""


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
