"""Where soups are made and tasted: one model to put averaged weights into, the pixels of every split the sweep names (decoded once), and
the scores already known. A soup is a list of trial ids; one named twice counts twice.

Every forward pass has the same shape (a short block is filled up), so that what a model says about a sample does not depend on the block.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stockpot.checkpoints import load_weights
from stockpot.config import MixingSpec, Sweep
from stockpot.data.node_cache import cache_root
from stockpot.data.shards import Pixels, pixels
from stockpot.data.snapshots import open_snapshot
from stockpot.data.splits import point
from stockpot.digests import digest
from stockpot.errors import BadRequest, ModelError
from stockpot.evaluation import accuracy, normalise
from stockpot.models.classifier import Classifier, build
from stockpot.models.folders import check_fingerprint, write_model
from stockpot.models.loading import load_state
from stockpot.outcomes import Accuracy, Cost, Scores
from stockpot.soup import footprint
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.batch_norm import norms
from stockpot.soup.recipes.examining import Verdict, block_size, doubtful_first, examine
from stockpot.soup.recipes.greedy import ranked
from stockpot.soup.recipes.learned import learn, mixture
from stockpot.soup.recipes.preranking import by_averaged_logits
from stockpot.soup.score_cache import ScoreCache
from stockpot.soup.settling import settle, settling_samples
from stockpot.soup.soupability import Pool

# N samples, B block, C classes


@dataclass(frozen=True)
class Dish:
    """Weights that can be made when they are needed."""

    identity: tuple[str, ...]
    """What decides them: the sha256 of every file in a plain mean, or of files, coefficients and recipe."""
    make: Callable[[], dict[str, Tensor]]
    trials: tuple[str, ...] = ()
    """What it is made of."""
    shares: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Layer to the weight of each of `trials`; empty for a plain mean."""
    fitted: float = 0.0
    """Share of held_out that the weights were fitted on (`MixingSpec.share`), which its own score there leaves out."""


@dataclass
class Stove:
    """A device with the model on it, and what it holds now."""

    device: str
    model: Classifier
    loaded: tuple[str, ...] = ()
    settling: Sequence[Tensor] = ()
    """Training samples that BatchNorm statistics are estimated on whenever the weights change; none leaves them as they are averaged."""
    samples: int = 0
    """Forward passes of one sample so far."""

    def hold(self, dish: Dish) -> None:
        """Put the dish's weights into the model, unless they are in it."""
        if dish.identity != self.loaded:
            load_state(self.model, dish.make())
            settle(self.model, self.settling, self.device)
            self.samples += sum(map(len, self.settling))
            self.loaded = dish.identity


class Kitchen:
    """The pool, the model and the pixels of one sweep."""

    def __init__(self, sweep: Sweep, pool: Pool, devices: Sequence[str] | None = None) -> None:
        """devices: where greedy's candidates are scored at once; None is every GPU, or the CPU."""
        config = pool.config
        main = open_snapshot(sweep.data.snapshot)
        main.require_classes(config.classes)
        pinned = {"held_out": main, "gate": main}
        if sweep.data.test:
            pinned["test"] = open_snapshot(sweep.data.test)
        self.suites = tuple(sweep.data.shifts)
        pinned |= {_suite(name): open_snapshot(one) for name, one in sweep.data.shifts.items()}
        self.pool = pool
        self.config = config
        self.metric = sweep.request.soup.metric
        self.splits: dict[str, Pixels] = {
            name: pixels(snapshot, name if snapshot is main else "test", config.preprocess) for name, snapshot in pinned.items()
        }
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._digests = {name: snapshot.digest for name, snapshot in pinned.items()}
        self._cache = ScoreCache(cache_root() / "scores", self.device, self.metric)
        places = devices or [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
        models = [build(config).to(place).eval() for place in places]
        self.settling = settling_samples(sweep, config.preprocess) if norms(models[0]) else ()
        self._settled = (f"BatchNorm of {sum(map(len, self.settling))} samples of {main.digest}",) if self.settling else ()
        self.stoves = [Stove(place, model, settling=self.settling) for place, model in zip(places, models, strict=True)]
        self._soups: dict[tuple[str, ...], Tensor] = {}
        self._told: tuple[Dish, dict[str, Tensor]] | None = None
        self.costs: dict[str, Cost] = {}
        self.speculated = 0
        """Forward passes of one sample whose answer nobody asked for in the end."""

    def soup(self, trials: Sequence[str]) -> Dish:
        """The plain mean of these trials, a pure function of what is in it, whatever the order of their names."""
        chosen = [self.pool.candidates[trial] for trial in sorted(trials)]
        identity = tuple(sorted(one.ingredient.weights_sha256 for one in chosen))
        return Dish(identity, lambda: average([one.weights for one in chosen]), tuple(trials))

    def learned(self, spec: MixingSpec, *, by_layer: bool) -> Dish:
        """The mixture of the best ingredients that is learned on the mixing share of held_out. It takes the kitchen's model to learn."""
        trials = ranked(self.pool.held_out)[: spec.ingredients]
        files = [self.pool.candidates[trial].weights for trial in trials]
        shares = learn(self.stoves[0].model, files, self._mixing_batches(spec), by_layer=by_layer, learning_rate=spec.learning_rate)
        self.stoves[0].loaded = ()
        identity = (digest(shares), *[self.pool.candidates[trial].ingredient.weights_sha256 for trial in trials])
        return Dish(identity, lambda: mixture(files, shares), tuple(trials), shares, spec.share)

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Note what the block costs, under a recipe's name."""
        began, before, ahead, peak_bytes = time.monotonic(), self._samples(), self.speculated, footprint.watch(self.device)
        yield
        samples, speculated = self._samples() - before, self.speculated - ahead
        self.costs[name] = Cost(samples=samples, speculated=speculated, seconds=time.monotonic() - began, peak_bytes=peak_bytes())

    def _samples(self) -> int:
        return sum(stove.samples for stove in self.stoves) - self.speculated

    def _mixing_batches(self, spec: MixingSpec) -> Iterator[tuple[Tensor, Tensor]]:
        seen, fitted_N = self.splits["held_out"], self._fitted(spec.share)
        numbers = fitted_N.nonzero()[0]
        rng = np.random.default_rng(0)
        for _ in range(spec.epochs):
            order = rng.permutation(numbers)
            for start in range(0, len(order), spec.batch_size):
                some = order[start : start + spec.batch_size]
                self.stoves[0].samples += len(some)
                images = torch.from_numpy(np.ascontiguousarray(seen.images[some])).to(self.stoves[0].device)
                yield normalise(images, self.config.preprocess), torch.as_tensor(seen.labels[some]).to(images.device)

    def _fitted(self, share: float) -> np.ndarray:
        """Which samples of held_out learned mixing is fitted on: bool (N,). Raises `BadRequest` where that is none, or all."""
        fitted_N = np.array([point(key, "stockpot/mixing") < share * 2**64 for key in self.splits["held_out"].keys])
        if fitted_N.all() or not fitted_N.any():
            raise BadRequest(
                f"`mixing.share` {share:g} takes {fitted_N.sum()} of {len(fitted_N)} held_out samples, and learned mixing needs some to be "
                "fitted on and some to be scored on; ask for a share nearer to 0.5, or give the snapshot a larger held_out."
            )
        return fitted_N

    def unfitted(self, dish: Dish, share: float) -> Accuracy:
        """A dish's accuracy on the samples of held_out that learned mixing with this share is not fitted on, measured once."""
        seen = self.splits["held_out"]
        key = self._key(dish, "held_out", f" but {share} for mixing")
        if (known := self._cache.get(key, 0)) is None:
            rest_N = ~self._fitted(share)
            found = accuracy(self.logits(dish, "held_out")[torch.from_numpy(rest_N)], seen.labels[rest_N], self.metric)
            known = Verdict(found, found.seen)
            self._cache.put(key, known)
        return known.accuracy

    def logits(self, dish: Dish, split: str) -> Tensor:
        """What a dish says about every sample of a split: float32 (N, C). Of the last dish, held_out and gate are remembered."""
        if self._told is None or self._told[0].identity != dish.identity:
            self._told = dish, {}
        if (told := self._told[1].get(split)) is not None:
            return told
        verdict, logits_NC = self._examine(dish, split, torch.arange(len(self.splits[split].labels)), 0)
        assert logits_NC is not None
        self._cache.put(self._key(dish, split), verdict)
        if split in ("held_out", "gate"):
            self._told[1][split] = logits_NC
        return logits_NC

    def accuracy(self, dish: Dish, split: str) -> Accuracy:
        """A dish's exact accuracy on a split, measured once."""
        known = self._cache.get(self._key(dish, split), 0)
        if known is None:
            self.logits(dish, split)
            known = self._cache.get(self._key(dish, split), 0)
            assert known is not None
        return known.accuracy

    def rescored(self, pool: Pool, trial: str) -> Pool:
        """The pool with one of this kitchen's candidates judged by what it says here, instead of what was recorded of it."""
        seen = self.splits["held_out"]
        return pool.rescored(trial, self.logits(self.soup([trial]), "held_out"), seen.labels, seen.transform_digest)

    def verdict(self, trials: Sequence[str], need: int, stove: Stove | None = None) -> Verdict:
        """A greedy candidate on held_out, looked at no longer than its fate is open: the newest ingredient is the last one named."""
        dish = self.soup(trials)
        key = self._key(dish, "held_out")
        if known := self._cache.get(key, need):
            return known
        labels_N = torch.as_tensor(self.splits["held_out"].labels)
        soup_NC = self._soup_logits(trials[:-1])
        order = doubtful_first(soup_NC, len(trials) - 1, self.pool.candidates[trials[-1]].logits, labels_N)
        verdict, logits_NC = self._examine(dish, "held_out", order, need, stove)
        self._cache.put(key, verdict)
        if need and logits_NC is not None and verdict.accuracy.correct >= need:
            self._soups[tuple(trials)] = logits_NC
            for past in [soup for soup in list(self._soups) if len(soup) < len(trials) - 1]:
                self._soups.pop(past, None)  # another device may have done it
        return verdict

    def by_averaged_logits(self, soup: Sequence[str], left: Sequence[str]) -> list[str]:
        """The order in which greedy visits the candidates that are left, by the logits they stored."""
        logits = {trial: one.logits for trial, one in self.pool.candidates.items()}
        return by_averaged_logits(logits, torch.as_tensor(self.splits["held_out"].labels), soup, left)

    def scores(self, dish: Dish) -> Scores:
        """A dish on every split the sweep names; on held_out without what it was fitted on."""
        return self.scores_by(
            lambda split: self.unfitted(dish, dish.fitted) if dish.fitted and split == "held_out" else self.accuracy(dish, split)
        )

    def scores_by(self, accuracy: Callable[[str], Accuracy]) -> Scores:
        """Whatever `accuracy` measures, on every split the sweep names."""
        return Scores(
            held_out=accuracy("held_out"),
            gate=accuracy("gate"),
            test=accuracy("test") if "test" in self.splits else None,
            shifts={name: accuracy(_suite(name)) for name in self.suites},
        )

    def shifts(self, dish: Dish) -> dict[str, Accuracy]:
        """A dish on every shift suite."""
        return {name: self.accuracy(dish, _suite(name)) for name in self.suites}

    def check_reload(self, trial: str) -> str | None:
        """Why a candidate, loaded again, is not the model its trial stored; None when it is."""
        stove, weights = self.stoves[0], self.pool.candidates[trial].weights.path
        stove.loaded = ()
        try:
            load_state(stove.model, load_weights(weights))
            check_fingerprint(stove.model, weights.parent)
        except ModelError as error:
            return str(error)
        return None

    def store(self, dish: Dish, folder: Path) -> str:
        """Write a dish as a model of its own; returns the sha256 of its weights."""
        stove = self.stoves[0]
        stove.hold(dish)
        return write_model(folder, stove.model)

    def _examine(self, dish: Dish, split: str, order: Tensor, need: int, stove: Stove | None = None) -> tuple[Verdict, Tensor | None]:
        stove = stove or self.stoves[0]
        before = stove.samples
        stove.hold(dish)
        seen = self.splits[split]
        block = block_size(len(seen.labels))

        @torch.inference_mode()
        def predict(numbers_B: Tensor) -> Tensor:
            stove.samples += len(numbers_B)
            filled = numbers_B.new_zeros(block)
            filled[: len(numbers_B)] = numbers_B
            images = torch.from_numpy(np.ascontiguousarray(seen.images[filled.numpy()])).to(stove.device)
            logits_BC: Tensor = stove.model(normalise(images, self.config.preprocess))
            return logits_BC[: len(numbers_B)].float().cpu()

        verdict, logits_NC = examine(predict, torch.as_tensor(seen.labels), order, need, block)
        if logits_NC is not None and self.metric != "accuracy":
            verdict = verdict._replace(accuracy=accuracy(logits_NC, seen.labels, self.metric))
        return verdict._replace(passes=stove.samples - before), logits_NC

    def _soup_logits(self, trials: Sequence[str]) -> Tensor:
        """The soup's own logits where its last examination left them, else the mean of its members': they only decide an order."""
        if (told := self._soups.get(tuple(trials))) is not None:
            return told
        return torch.stack([self.pool.candidates[trial].logits for trial in trials]).mean(dim=0)

    def _key(self, dish: Dish, split: str, part: str = "") -> str:
        return self._cache.key(dish.identity + self._settled, self._digests[split], split + part, self.splits[split].transform_digest)


def _suite(name: str) -> str:
    return f"shift/{name}"
