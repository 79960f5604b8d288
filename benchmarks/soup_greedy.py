"""Exact early rejection on a pool of real trials: the demo's digits and sweep, more trials, ranked and cooked on its 400 held-out images
under ten distortions (4,000 samples, so that a block is a small share of the set).

`soup.rejected_over_floor`: held-out samples looked at per rejected candidate over the least any exact method must look at (allowed errors
plus one). `soup.greedy_forward_share`: all samples looked at over those of the plain loop, which decides the same; the run fails if it
does not. The pool is trained once (about four CPU-seconds a trial) and kept in `.stockpot/bench`.
"""

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torchvision.transforms.v2 import functional as pictures

from deployments.demo.base import pretrain
from deployments.demo.control import REQUEST
from deployments.demo.digits import publish_digits
from stockpot.checkpoints import save_weights
from stockpot.config import BaseSpec, InitSpec, SweepSpec
from stockpot.data.shards import pixels
from stockpot.data.snapshots import Snapshot, open_snapshot, pin
from stockpot.evaluation import logits, normalise
from stockpot.models.classifier import Classifier, ModelConfig, build
from stockpot.models.loading import load_state
from stockpot.outcomes import Accuracy, GreedyStep
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.examining import Verdict, block_size, doubtful_first, examine, floor, right
from stockpot.soup.recipes.greedy import Accept, greedy
from stockpot.soup.recipes.weights import Weights, open_weights
from stockpot.sweeps import draw
from stockpot.training import inits
from stockpot.training.course import fine_tune

TRIALS = 24
SEED = 10
ACCEPTS: tuple[Accept, ...] = ("improve", "not_worse")

# N samples, C classes


def measure(trials: int = TRIALS) -> dict[str, dict[str, Any]]:
    """Every figure by its name in the bench file; pools of 8 and of all `trials`."""
    folder = Path(".stockpot/bench/greedy").absolute()
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    torch.set_num_threads(1)
    config, main = _train(folder, trials)
    held_out = pixels(main, "held_out", config.preprocess)
    bench = Bench(config, *_distorted(torch.from_numpy(np.array(held_out.images)), torch.as_tensor(held_out.labels)))
    pool = {f"{index:02d}": open_weights(folder / "trials" / f"{index:02d}.safetensors") for index in range(trials)}
    found: dict[str, dict[str, Any]] = {}
    for size in sorted({8, trials}):
        for accept in ACCEPTS:
            suffix = ("" if size == trials else f"_{size}") + ("" if accept == "improve" else "_ties")
            found |= bench.compare(dict(list(pool.items())[:size]), accept, suffix)
    return found


class Bench:
    """One model and one held-out set."""

    def __init__(self, config: ModelConfig, images_N3SS: Tensor, labels_N: Tensor) -> None:
        self.config, self.images, self.labels = config, images_N3SS, labels_N
        self.model: Classifier = build(config).eval()
        self.block = block_size(len(labels_N))

    def compare(self, pool: dict[str, Weights], accept: Accept, suffix: str) -> dict[str, dict[str, Any]]:
        """The plain loop and ours on one pool."""
        singles = {trial: self._logits([file]) for trial, file in pool.items()}
        held_out = {trial: self._accuracy(told) for trial, told in singles.items()}
        began = time.perf_counter()
        plain = greedy(held_out, lambda trials, _need: self._plain(pool, trials), accept)
        middle = time.perf_counter()
        ours = greedy(held_out, self._early(pool, singles), accept)
        ended = time.perf_counter()
        if [(step.trial_id, step.kept) for step in plain] != [(step.trial_id, step.kept) for step in ours]:
            raise AssertionError("early rejection changed a decision")
        return _figures(ours, accept, suffix, len(pool), (middle - began) / (ended - middle))

    def _plain(self, pool: dict[str, Weights], trials: Sequence[str]) -> Verdict:
        return Verdict(self._accuracy(self._logits([pool[trial] for trial in sorted(trials)])), len(self.labels))

    def _early(self, pool: dict[str, Weights], singles: dict[str, Tensor]) -> Any:
        soups: dict[tuple[str, ...], Tensor] = {(trial,): told for trial, told in singles.items()}

        def score(trials: Sequence[str], need: int) -> Verdict:
            load_state(self.model, average([pool[trial] for trial in sorted(trials)]))
            order = doubtful_first(soups[tuple(trials[:-1])], len(trials) - 1, singles[trials[-1]], self.labels)
            verdict, told = examine(self._predict, self.labels, order, need, self.block)
            if told is not None:
                soups[tuple(trials)] = told
            return verdict

        return score

    def _logits(self, files: Sequence[Weights]) -> Tensor:
        load_state(self.model, average(files))
        return logits(self.model, self.images, self.config.preprocess, batch_size=self.block)

    @torch.inference_mode()
    def _predict(self, numbers_B: Tensor) -> Tensor:
        told: Tensor = self.model(normalise(self.images[numbers_B], self.config.preprocess))
        return told

    def _accuracy(self, told: Tensor) -> Accuracy:
        return Accuracy(correct=int(right(told, self.labels).sum()), seen=len(self.labels))


def _figures(steps: Sequence[GreedyStep], accept: Accept, suffix: str, trials: int, wall: float) -> dict[str, dict[str, Any]]:
    seen = steps[0].after.seen
    over = []
    for step in steps[1:]:
        if not step.kept and step.before:
            need = step.before.correct + (1 if accept == "improve" else 0)
            over.append(step.examined / seen / floor(need, seen))
    share = sum(step.examined for step in steps[1:]) / (seen * (trials - 1))
    kept = sum(step.kept for step in steps)
    what = {"repeats": 1, "trials": trials, "kept": kept, "samples": seen}
    return {
        f"soup.rejected_over_floor{suffix}": {
            "ratio": round(statistics.fmean(over), 3), "unit": "samples looked at / least possible", "peer": "certificate floor",
            "spread": [round(min(over), 3), round(max(over), 3)], **what,
        },
        f"soup.greedy_forward_share{suffix}": {
            "ratio": round(share, 3), "unit": "samples looked at / plain loop", "peer": "reference greedy loop",
            "spread": [round(share, 3)] * 2,             "wall_ratio": round(wall, 2), **what,
        },
    }  # fmt: skip


def _train(folder: Path, trials: int) -> tuple[ModelConfig, Snapshot]:
    request = yaml.safe_load(REQUEST.read_text())
    data = publish_digits(str(folder / "digits"), SEED)
    arch, weights = pretrain(data, str(folder / "base"), SEED)
    pinned = pin(data["snapshot"])
    spec = InitSpec.model_validate(request["init"])
    config, init = inits.fetch(inits.prepare(BaseSpec(arch=arch, weights=weights), spec, pinned, str(folder / "store")))
    main, model = open_snapshot(pinned), build(config)
    sweep = SweepSpec.model_validate({**request["sweep"], "seed": SEED, "trials": trials})
    for index, settings in enumerate(draw(sweep)):
        path = folder / "trials" / f"{index:02d}.safetensors"
        if not path.exists():
            load_state(model, init)
            fine_tune(model, settings, main)
            save_weights(path, model.state_dict())
    return config, main


def _distorted(images_N3SS: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Ten copies: turned by -18 to 18 degrees, with noise growing from 0 to 36 of 255."""
    rng = torch.Generator().manual_seed(0)
    copies = []
    for number in range(10):
        turned = pictures.rotate(images_N3SS, 4.0 * number - 18, interpolation=pictures.InterpolationMode.BILINEAR)
        noise = torch.randn(images_N3SS.shape, generator=rng) * 4 * number
        copies.append((turned.float() + noise).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(copies), labels_N.repeat(10)


if __name__ == "__main__":
    for name, figure in measure().items():
        print(name, figure)
