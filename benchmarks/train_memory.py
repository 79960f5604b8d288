"""What a trial holds beside plain AdamW, which is four copies of the weights (weights, gradients, two moments) and activations.

`train.memory_*`: what moving averages, SAM and evaluation add to the peak memory of a trial, in copies of its float32 weights; each figure
is of processes of their own, on a CPU, with a model of 300 MB. On a GPU what is said to be kept on the CPU takes none of its memory.
"""

import json
import subprocess
import sys
from typing import Any

import torch
from torch import nn

from benchmarks.train import SETTINGS, Batch
from stockpot.evaluation import accuracy, logits
from stockpot.models.classifier import ModelConfig, build
from stockpot.outcomes import Accuracy
from stockpot.preparation import Preprocess
from stockpot.settings import TrialSettings
from stockpot.training.trainer import train

PEAK = """
import resource, sys
import torch
from benchmarks import train_memory
torch.set_num_threads(2)
train_memory.fat_trial(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
PREPROCESS = Preprocess(size=32, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
FAT = {"embed_dim": 64, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 1024, "layers": 6, "head_width": 64}}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "moving_average": {"ema_decays": (0.999,)},
    "moving_average_evaluated": {"ema_decays": (0.999,), "evaluate_every_steps": 1},
    "sam": {"sam_rho": 0.05},
    "evaluation": {"evaluate_every_steps": 1},
}
PEERS = {
    "moving_average": "plain AdamW; the average is kept in float64, which is two copies of the float32 weights",
    "moving_average_evaluated": "plain AdamW; two copies are the average in float64, one the average as float32 while it is evaluated, and "
    "two, kept on the CPU, the best weights and the best average so far",
    "sam": "plain AdamW; one more copy is the weights to come back to",
    "evaluation": "plain AdamW; one more copy is the best weights so far, kept on the CPU. A copy of the optimiser would be two",
}
REPEATS = 2


def measure() -> dict[str, dict[str, Any]]:
    """Every figure by its name in the bench file."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in fat_model().parameters())
    peaks = {name: min(peak(name) for _ in range(REPEATS)) for name in VARIANTS}
    return {
        f"train.memory_{name}": {
            "ratio": (peaks[name] - peaks["plain"]) / weights,
            "unit": "copies of the weights added to the peak",
            "peer": peer,
            "repeats": REPEATS,
            "spread": {"weights_mb": round(weights / 1e6), "plain_mb": round(peaks["plain"] / 1e6), "peak_mb": round(peaks[name] / 1e6)},
        }
        for name, peer in PEERS.items()
    }


def peak(variant: str) -> int:
    """Bytes that a process with such a trial held at the most."""
    return int(subprocess.run([sys.executable, "-c", PEAK, variant], stdout=subprocess.PIPE, check=True).stdout.split()[-1])


def fat_model() -> nn.Module:
    """Much weight, little activation: what is held twice shows."""
    torch.manual_seed(0)
    return build(ModelConfig(kind="open_clip", arch=FAT, preprocess=PREPROCESS, classes=tuple("abcdefghij")))


def fat_trial(variant: str) -> None:
    """Three steps of the fat model with one of `VARIANTS`."""
    settings = TrialSettings.model_validate({**SETTINGS.model_dump(), "max_steps": 3, **VARIANTS[variant]})
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (4,))

    def score(net: nn.Module) -> Accuracy:
        return accuracy(logits(net, images, PREPROCESS), labels)

    batch = Batch(images, labels)
    train(fat_model(), settings, lambda _epoch, _skip: iter([batch] * 3), steps_per_epoch=3, preprocess=PREPROCESS, score=score)


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
