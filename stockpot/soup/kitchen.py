"""Where soups are made and tasted: one model to put averaged weights into, the pixels of every split the sweep names (decoded once), and
the scores already known. A soup is a list of trial ids; one named twice counts twice.

Every forward pass has the same shape (a short block is filled up), so that what a model says about a sample does not depend on the block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stockpot.config import Sweep
from stockpot.data.node_cache import cache_root
from stockpot.data.shards import Pixels, pixels
from stockpot.data.snapshots import open_snapshot
from stockpot.evaluation import normalise
from stockpot.models.classifier import build
from stockpot.models.loading import load_state
from stockpot.outcomes import Accuracy, Scores
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.examining import Verdict, block_size, doubtful_first, examine
from stockpot.soup.score_cache import ScoreCache
from stockpot.soup.soupability import Pool

# N samples, B block, C classes


@dataclass(frozen=True)
class Dish:
    """Weights that can be made when they are needed."""

    identity: tuple[str, ...]
    """What decides them: the sha256 of every file in a plain mean, or of files, coefficients and recipe."""
    make: Callable[[], dict[str, Tensor]]


class Kitchen:
    """The pool, the model and the pixels of one sweep."""

    def __init__(self, sweep: Sweep, pool: Pool) -> None:
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
        self.splits: dict[str, Pixels] = {
            name: pixels(snapshot, name if snapshot is main else "test", config.preprocess) for name, snapshot in pinned.items()
        }
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._digests = {name: snapshot.digest for name, snapshot in pinned.items()}
        self._cache = ScoreCache(cache_root() / "scores", self.device)
        self._model = build(config).to(self.device).eval()
        self._loaded: tuple[str, ...] = ()
        self._soup: tuple[tuple[str, ...], Tensor] | None = None

    def soup(self, trials: Sequence[str]) -> Dish:
        """The plain mean of these trials, a pure function of what is in it: members are summed in the order of their ids."""
        chosen = [self.pool.candidates[trial] for trial in sorted(trials)]
        identity = tuple(sorted(one.ingredient.weights_sha256 for one in chosen))
        return Dish(identity, lambda: average([one.weights for one in chosen]))

    def logits(self, dish: Dish, split: str) -> Tensor:
        """What a dish says about every sample of a split: float32 (N, C)."""
        seen = self.splits[split]
        verdict, logits_NC = self._examine(dish, split, torch.arange(len(seen.labels)), 0)
        assert logits_NC is not None
        self._cache.put(self._key(dish, split), verdict)
        return logits_NC

    def accuracy(self, dish: Dish, split: str) -> Accuracy:
        """A dish's exact accuracy on a split, measured once."""
        known = self._cache.get(self._key(dish, split), 0)
        if known is None:
            self.logits(dish, split)
            known = self._cache.get(self._key(dish, split), 0)
            assert known is not None
        return known.accuracy

    def verdict(self, trials: Sequence[str], need: int) -> Verdict:
        """A greedy candidate on held_out, looked at no longer than its fate is open: the newest ingredient is the last one named."""
        dish = self.soup(trials)
        key = self._key(dish, "held_out")
        if known := self._cache.get(key, need):
            return known
        labels_N = torch.as_tensor(self.splits["held_out"].labels)
        soup_NC = self._soup_logits(trials[:-1])
        order = doubtful_first(soup_NC, len(trials) - 1, self.pool.candidates[trials[-1]].logits, labels_N)
        verdict, logits_NC = self._examine(dish, "held_out", order, need)
        self._cache.put(key, verdict)
        if logits_NC is not None and verdict.accuracy.correct >= need:
            self._soup = (tuple(trials), logits_NC)
        return verdict

    def scores(self, dish: Dish) -> Scores:
        """A dish on every split the sweep names."""
        return self.scores_by(partial(self.accuracy, dish))

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

    def _examine(self, dish: Dish, split: str, order: Tensor, need: int) -> tuple[Verdict, Tensor | None]:
        if dish.identity != self._loaded:
            load_state(self._model, dish.make())
            self._loaded = dish.identity
        seen = self.splits[split]
        block = block_size(len(seen.labels))

        @torch.inference_mode()
        def predict(numbers_B: Tensor) -> Tensor:
            filled = numbers_B.new_zeros(block)
            filled[: len(numbers_B)] = numbers_B
            images = torch.from_numpy(np.ascontiguousarray(seen.images[filled.numpy()])).to(self.device)
            logits_BC: Tensor = self._model(normalise(images, self.config.preprocess))
            return logits_BC[: len(numbers_B)].float().cpu()

        return examine(predict, torch.as_tensor(seen.labels), order, need, block)

    def _soup_logits(self, trials: Sequence[str]) -> Tensor:
        """The soup's own logits where its last examination left them, else the mean of its members': they only decide an order."""
        if self._soup and self._soup[0] == tuple(trials):
            return self._soup[1]
        return torch.stack([self.pool.candidates[trial].logits for trial in trials]).mean(dim=0)

    def _key(self, dish: Dish, split: str) -> str:
        return self._cache.key(dish.identity, self._digests[split], split, self.splits[split].transform_digest)


def _suite(name: str) -> str:
    return f"shift/{name}"
