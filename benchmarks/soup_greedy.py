"""Exact early rejection on pools of real trials: the demo's digits and tower, ranked and cooked on its 400 held-out images under ten
distortions (4,000 samples, so that a block is a small share of the set).

Two pools. The random search draws as the paper's does (Wortsman et al. 2022, appendix J.2.1): learning rate over two decades, annealed, so
most trials are left out; its first 8 and 24 and all 72 trials are cooked. The demo's own sweep is narrow and not annealed, so greedy keeps
half of it (`_narrow`): an accepted candidate costs a full pass, whatever the method.

`soup.rejected_over_floor`: held-out samples looked at per rejected candidate over the least any exact method must look at (allowed errors
plus one). `soup.greedy_forward_share`: all samples looked at over those of the plain loop, which decides the same; the run fails if it
does not. `floor` is the least share any exact method can have with these decisions: an accepted candidate in full, as its count is the next
bar, a rejected one at its floor. The pools are trained once, a trial a core, some four CPU-seconds each, and kept in `.stockpot/bench`
under what decides them. Ties are told for the pools of 24.
"""

import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torchvision.transforms.v2 import functional as pictures

from deployments.demo.control import REQUEST
from deployments.demo.digits import publish_digits
from deployments.demo.pretraining import pretrain
from stockpot.checkpoints import save_weights
from stockpot.config import BaseSpec, Init, InitSpec, PinnedSnapshot, SweepSpec
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot, pin
from stockpot.digests import file_digest, short
from stockpot.evaluation import logits, normalise, right
from stockpot.models.classifier import Classifier, ModelConfig, build
from stockpot.models.loading import load_state
from stockpot.outcomes import Accuracy, GreedyStep
from stockpot.processes import end_with_parent
from stockpot.settings import TrialSettings
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.examining import Verdict, block_size, doubtful_first, examine, floor
from stockpot.soup.recipes.greedy import Accept, greedy
from stockpot.soup.recipes.weights import Weights, open_weights
from stockpot.sweeps import draw
from stockpot.training import inits
from stockpot.training.course import fine_tune

SIZES = (8, 24, 72)
NARROW = 24
SEED = 10
ACCEPTS: tuple[Accept, ...] = ("improve", "not_worse")
RANDOM_SEARCH = {
    "settings": {"batch_size": 64, "schedule": "cosine", "warmup_steps": 30},
    "space": {
        "learning_rate": {"log_uniform": [1e-4, 1e-2]},  # the paper's two decades around the rate that suits this tower
        "weight_decay": {"log_uniform": [1e-4, 0.6309573445]},
        "epochs": {"int_uniform": [8, 32]},
        "label_smoothing": {"probability": 0.5, "value": 0, "otherwise": {"uniform": [0, 0.25]}},
        "mixup": {"probability": 0.5, "value": 0, "otherwise": {"uniform": [0, 0.9]}},
        "augmentation": {"choice": ["none", "deployments.demo.augment:mild", "deployments.demo.augment:medium"]},
    },
}

# N samples, C classes


def measure() -> dict[str, dict[str, Any]]:
    """Every figure by its name in the bench file; the suffix says the pool, none is 24 trials of the random search."""
    folder = Path(".stockpot/bench/greedy").absolute()
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    torch.set_num_threads(1)
    request = yaml.safe_load(REQUEST.read_text())
    init, snapshot = _ground(folder, request)
    config, main = inits.fetch(init)[0], open_snapshot(snapshot)
    held_out = pixels(main, "held_out", config.preprocess)
    bench = Bench(config, *_distorted(torch.from_numpy(np.array(held_out.images)), torch.as_tensor(held_out.labels)))
    search = _train(folder, max(SIZES), RANDOM_SEARCH, init, snapshot)
    narrow = _train(folder, NARROW, request["sweep"], init, snapshot)
    pools = {"" if size == 24 else f"_{size}": search[:size] for size in SIZES} | {"_narrow": narrow}
    found: dict[str, dict[str, Any]] = {}
    for suffix, paths in pools.items():
        files = {path.stem: open_weights(path, file_digest(path)) for path in paths}
        for accept in ACCEPTS if len(paths) == NARROW else ACCEPTS[:1]:
            found |= bench.compare(files, accept, suffix + ("" if accept == "improve" else "_ties"))
        for file in files.values():
            file.close()
    return found


class Bench:
    """One model and one held-out set."""

    def __init__(self, config: ModelConfig, images_N3SS: Tensor, labels_N: Tensor) -> None:
        self.config, self.images, self.labels = config, images_N3SS, labels_N
        self.model: Classifier = build(config).eval()
        self.block = block_size(len(labels_N))
        self._singles: dict[Path, Tensor] = {}

    def compare(self, pool: dict[str, Weights], accept: Accept, suffix: str) -> dict[str, dict[str, Any]]:
        """The plain loop and ours on one pool."""
        for file in pool.values():
            if file.path not in self._singles:
                self._singles[file.path] = self._logits([file])
        singles = {trial: self._singles[file.path] for trial, file in pool.items()}
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
    over, least = [], 0.0
    for step in steps[1:]:
        assert step.before
        lowest = floor(step.before.correct + (1 if accept == "improve" else 0), seen)
        least += 1.0 if step.kept else lowest
        if not step.kept:
            over.append(step.examined / seen / lowest)
    share = sum(step.examined for step in steps[1:]) / (seen * (trials - 1))
    kept = sum(step.kept for step in steps)
    what = {"repeats": 1, "trials": trials, "kept": kept, "samples": seen, "best_single": steps[0].after.value}
    rejected = {
        "ratio": round(statistics.fmean(over), 3), "unit": "samples looked at / least possible", "peer": "certificate floor",
        "spread": [round(min(over), 3), round(max(over), 3)], **what,
    } if over else None  # fmt: skip
    return {
        **({f"soup.rejected_over_floor{suffix}": rejected} if rejected else {}),
        f"soup.greedy_forward_share{suffix}": {
            "ratio": round(share, 3), "unit": "samples looked at / plain loop", "peer": "reference greedy loop",
            "spread": [round(share, 3)] * 2, "floor": round(least / (trials - 1), 3), "wall_ratio": round(wall, 2), **what,
        },
    }  # fmt: skip


def _ground(folder: Path, request: dict[str, Any]) -> tuple[Init, PinnedSnapshot]:
    """The demo's data, base model and init."""
    data = publish_digits(str(folder / "digits"), SEED)
    arch, weights = pretrain(data, str(folder / "base"), SEED)
    pinned = pin(data["snapshot"])
    spec = InitSpec.model_validate(request["init"])
    return inits.prepare(BaseSpec(arch=arch, weights=weights), spec, pinned, str(folder / "store")), pinned


def _train(folder: Path, trials: int, sweep: dict[str, Any], init: Init, snapshot: PinnedSnapshot) -> list[Path]:
    """The trials' weights, each trained unless its file is there, a process a core."""
    drawn = draw(SweepSpec.model_validate({**sweep, "seed": SEED, "trials": trials}))
    pool = folder / f"pool-{short([init.digest, snapshot.digest, *drawn])}"
    paths = [pool / f"{index:02d}.safetensors" for index in range(trials)]
    todo = [(path, settings) for path, settings in zip(paths, drawn, strict=True) if not path.exists()]
    if todo:
        context = get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=_begin) as workers:
            list(workers.map(partial(_train_one, init, snapshot), todo))
    return paths


def _begin() -> None:
    end_with_parent()
    torch.set_num_threads(1)


def _train_one(init: Init, snapshot: PinnedSnapshot, todo: tuple[Path, TrialSettings]) -> None:
    path, settings = todo
    model = inits.load(init)
    fine_tune(model, settings, open_snapshot(snapshot))
    save_weights(path, model.state_dict())


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
