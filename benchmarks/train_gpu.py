"""Trials on a GPU: images per second and model FLOPs utilisation of ViT-B/32 and ViT-L/14 in bf16, against a bare loop and against the
matrix rate that the card was measured to have; and whether the input pipeline keeps up.

`train_gpu.<model>_vs_bare`: images per second of the trainer over those of a bare PyTorch loop, on one batch in memory.
`train_gpu.<model>_mfu`: FLOPs of the steps done (counted by PyTorch, forward and backward) over those the card could have done.
`train_gpu.<model>_input`: images per second of the reader, warm, on all cores, over those the trainer takes. Below 1, input is the limit.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._photos import CLASSES, photos
from stockpot.data.publishing import GivenSamples, publish
from stockpot.data.shards import TrainReader
from stockpot.data.snapshots import open_snapshot
from stockpot.evaluation import normalise
from stockpot.models.classifier import ModelConfig, build
from stockpot.preparation import Preprocess
from stockpot.settings import TrialSettings
from stockpot.training.augmentation import augmentation
from stockpot.training.trainer import train


class Shape(NamedTuple):
    """How much is measured."""

    models: dict[str, tuple[int, dict[str, Any]]]
    """Name to (images a batch, open_clip config)."""
    steps: int
    pairs: int
    matrix: int
    """Side of the square matrices that are multiplied."""
    photos: int
    size: int


CARD = Shape(
    {
        "vit_b_32": (1024, {"embed_dim": 512, "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 768, "layers": 12}}),
        "vit_l_14": (256, {"embed_dim": 768, "vision_cfg": {"image_size": 224, "patch_size": 14, "width": 1024, "layers": 24}}),
    },
    steps=20,
    pairs=5,
    matrix=8192,
    photos=1500,
    size=224,
)
TINY = Shape(
    {"vit_tiny": (4, {"embed_dim": 8, "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}})},
    steps=2,
    pairs=1,
    matrix=64,
    photos=16,
    size=16,
)
"""The same measurement in a second, for a test on a CPU: its figures mean nothing."""


class Batch(NamedTuple):
    """What a reader yields."""

    images: Tensor
    labels: Tensor


def measure(shape: Shape = CARD, device: str = "cuda") -> dict[str, dict[str, Any]]:
    """Every figure by its name in the bench file. Exits with a sentence where there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This machine has no GPU that PyTorch can use; `make bench-gpu` measures one, `make bench` needs none.")
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    preprocess = Preprocess(size=shape.size, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    peak, input_rate = matrix_rate(shape.matrix, device), reading_rate(shape, preprocess)
    found: dict[str, dict[str, Any]] = {}
    for name, (size, arch) in shape.models.items():
        found |= _model(name, size, arch, shape, preprocess, device, card, peak, input_rate)
    return found


def _model(
    name: str,
    size: int,
    arch: dict[str, Any],
    shape: Shape,
    preprocess: Preprocess,
    device: str,
    card: str,
    peak: float,
    input_rate: float,
) -> dict[str, dict[str, Any]]:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        config = ModelConfig(kind="open_clip", arch=arch, preprocess=preprocess, classes=tuple(map(str, range(1000))))
        return build(config).to(device)

    batch = Batch(
        torch.randint(0, 256, (size, 3, shape.size, shape.size), dtype=torch.uint8, device=device),
        torch.randint(0, 1000, (size,), device=device),
    )
    settings = TrialSettings(epochs=1, batch_size=size, precision="bf16", warmup_steps=0)
    loops = {
        "ours": lambda net, steps: ours(net, settings, batch, preprocess, steps, device),
        "bare": lambda net, steps: bare(net, batch, preprocess, steps, device),
    }
    flops = flops_per_step(fresh(), batch, preprocess, device)
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for number in range(shape.pairs):
        for loop in sorted(loops, reverse=bool(number % 2)):
            net = fresh()
            loops[loop](net, 3)
            seconds[loop].append(timed(partial(loops[loop], net, shape.steps), device) / shape.steps)
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["bare"], strict=True)]
    rate = size / statistics.median(seconds["ours"])
    shared = {"repeats": shape.pairs, "card": card, "batch": size, "images_per_s": round(rate, 1)}
    return {
        f"train_gpu.{name}_vs_bare": {
            **shared,
            "ratio": statistics.median(ratios),
            "unit": f"images per second over images per second, bf16, {card}",
            "peer": f"bare PyTorch loop, {size / statistics.median(seconds['bare']):,.0f} images/s",
            "spread": [min(ratios), max(ratios)],
        },
        f"train_gpu.{name}_mfu": {
            **shared,
            "ratio": flops * rate / size / peak,
            "unit": f"of the measured bf16 matrix rate, {card}",
            "peer": f"{peak / 1e12:,.1f} TFLOP/s in products of {shape.matrix} x {shape.matrix}",
            "spread": [flops / each / peak for each in (max(seconds["ours"]), min(seconds["ours"]))],
        },
        f"train_gpu.{name}_input": {
            **shared,
            "ratio": input_rate / rate,
            "unit": "images per second read over images per second trained; below 1 the input is the limit",
            "peer": f"the trainer's {rate:,.0f} images/s; the reader gives {input_rate:,.0f} on {os.cpu_count()} cores",
            "spread": [],
        },
    }


def ours(net: nn.Module, settings: TrialSettings, batch: Batch, preprocess: Preprocess, steps: int, device: str) -> None:
    """The trainer, with a log that keeps everything."""
    logged: list[tuple[int, dict[str, float]]] = []

    def batches(_epoch: int, _skip: int) -> Iterator[Batch]:
        for _ in range(steps):
            yield batch

    train(
        net,
        settings.model_copy(update={"max_steps": steps}),
        batches,
        steps_per_epoch=steps,
        preprocess=preprocess,
        device=device,
        log=lambda metrics, step: logged.append((step, metrics)),
    )


def bare(net: nn.Module, batch: Batch, preprocess: Preprocess, steps: int, device: str) -> None:
    """What a specialist would write by hand."""
    net.train()
    rule = torch.optim.AdamW(net.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for _ in range(steps):
        with torch.autocast(device, torch.bfloat16):
            logits = net(normalise(batch.images, preprocess))
        loss = functional.cross_entropy(logits.float(), batch.labels)
        rule.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        rule.step()
        schedule.step()


def flops_per_step(net: nn.Module, batch: Batch, preprocess: Preprocess, device: str) -> int:
    """Floating-point operations of one forward and backward pass, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, torch.autocast(device, torch.bfloat16):
        net(normalise(batch.images[:2], preprocess)).float().sum().backward()
    return int(counter.get_total_flops() // 2 * len(batch.labels))


def matrix_rate(side: int, device: str, repeats: int = 30) -> float:
    """FLOP/s of products of two square bf16 matrices: the best of three rounds."""
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(one, other)

    multiply()
    return 2 * side**3 * repeats / min(timed(multiply, device) for _ in range(3))


def reading_rate(shape: Shape, preprocess: Preprocess) -> float:
    """Images per second of a warm epoch with minimal augmentation, on all cores."""
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as scratch:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        try:
            pinned = publish(f"{scratch}/photos", "photos", CLASSES, GivenSamples(list(photos(shape.photos))), splits="train")
            reader = TrainReader(
                open_snapshot(pinned),
                preprocess=preprocess,
                augment=augmentation("minimal", preprocess),
                batch_size=min(64, shape.photos),
                seed=0,
                loader_workers=(os.cpu_count() or 1) if shape is CARD else 0,
            )
            for _ in reader.batches(0):  # fills the cache and starts the workers
                pass
            began = time.perf_counter()
            read = sum(len(batch.labels) for batch in reader.batches(1))
            return read / (time.perf_counter() - began)
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds on the clock, the device's queue drained."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    print(Path(__file__).name, measure())
