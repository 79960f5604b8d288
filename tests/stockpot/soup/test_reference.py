"""Promise: whatever a request's `soup` asks for, greedy and the pruned soup decide, and what they make says, as the plain loop below does:
in float64, every candidate averaged anew and looked at in full, written from the papers (arXiv:2203.05482, recipe 1; arXiv:2301.10092 for
pruned) and the fields' descriptions with nothing of Stockpot's.

The models have one hidden layer, so that averaging weights is not averaging logits. Their weights are quarters and a thousandth apart per
class, so that float32 takes no two logits for another order than float64.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from stockpot.checkpoints import save_weights
from stockpot.evaluation import accuracy
from stockpot.outcomes import Accuracy, GreedyStep
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.examining import Verdict, doubtful_first, examine
from stockpot.soup.recipes.greedy import greedy, shuffled
from stockpot.soup.recipes.preranking import by_averaged_logits
from stockpot.soup.recipes.pruned import pruned
from stockpot.soup.recipes.speculation import Speculation
from stockpot.soup.recipes.weights import open_weights

Model = dict[str, NDArray[np.float64]]
FEATURES, HIDDEN, CLASSES = 3, 2, 3


def drawn(seed: int, trials: int, samples: int, spread: int) -> tuple[dict[str, Model], NDArray[np.int64], NDArray[np.int64]]:
    """A pool, with a duplicate from three trials on, inputs and labels."""
    rng = np.random.default_rng(seed)
    truth = {"first": rng.integers(-4, 5, (FEATURES, HIDDEN)), "second": rng.integers(-4, 5, (HIDDEN, CLASSES))}
    pool = {}
    for number in range(trials):
        pool[f"t{number}"] = {name: (part + rng.integers(-spread, spread + 1, part.shape)) / 4 for name, part in truth.items()}
    if trials > 2:
        pool["t1"] = pool["t2"]
    inputs = rng.integers(-2, 3, (samples, FEATURES))
    labels = logits({name: part / 4 for name, part in truth.items()}, inputs).argmax(1)
    return pool, inputs, np.where(rng.random(samples) < 0.2, rng.integers(0, CLASSES, samples), labels)


def logits(model: Any, inputs: Any) -> Any:
    """The network, in whatever its weights are."""
    hidden = inputs @ model["first"]
    return (hidden * (hidden > 0)) @ model["second"] + 0.001 * (torch if isinstance(hidden, Tensor) else np).arange(CLASSES)


# The reference: nothing of Stockpot's.


def f1(pairs: Sequence[tuple[int, int]], one: int) -> Fraction:
    """Twice the right answers of a class, over how often it was said and how often it was true."""
    return Fraction(2 * sum(pair == (one, one) for pair in pairs), sum(pair.count(one) for pair in pairs))


@dataclass
class Naive:
    pool: dict[str, Model]
    inputs: NDArray[np.int64]
    labels: NDArray[np.int64]
    metric: str = "accuracy"

    def mean(self, trials: Sequence[str]) -> Model:
        return {name: sum(self.pool[trial][name] for trial in trials) / len(trials) for name in ("first", "second")}  # type: ignore[misc]

    def answers(self, trials: Sequence[str]) -> list[int]:
        return [int(row.argmax()) for row in logits(self.mean(trials), self.inputs)]

    def value(self, answers: Sequence[int]) -> Fraction | float:
        pairs = list(zip(answers, self.labels.tolist(), strict=True))
        if self.metric == "macro_f1":
            every = [f1(pairs, one) for one in range(CLASSES) if any(one in pair for pair in pairs)]
            return sum(every, Fraction(0)) / len(every)
        if self.metric == "mcc":
            told, true = np.eye(CLASSES)[[a for a, _ in pairs]], np.eye(CLASSES)[[b for _, b in pairs]]
            spreads = [float(((one - one.mean(0)) ** 2).sum()) for one in (told, true)]
            together = float(((told - told.mean(0)) * (true - true.mean(0))).sum())
            return round(together / (spreads[0] * spreads[1]) ** 0.5, 12) + 0.0 if min(spreads) > 1e-12 else 0.0
        return Fraction(sum(a == b for a, b in pairs), len(pairs))

    def of(self, trials: Sequence[str]) -> Fraction | float:
        return self.value(self.answers(trials))

    def by_averaged_logits(self, trials: Sequence[str]) -> int:
        rows = sum(logits(self.pool[trial], self.inputs) for trial in trials)
        return sum(int(row.argmax()) == label for row, label in zip(rows, self.labels, strict=True))

    def ranked(self) -> list[str]:
        return sorted(self.pool, key=lambda trial: (-self.of([trial]), trial))

    def greedy(
        self, visit: Sequence[str], accept: str, passes: int, replacement: bool, prerank: bool, budget: int | None
    ) -> list[tuple[str, Fraction | float, bool, int]]:
        """(trial, value of the soup with it, kept, ingredients afterwards), in the order of the visits."""
        soup, best = [visit[0]], self.of(visit[:1])
        told = [(visit[0], best, True, 1)]
        for number in range(passes):
            kept_some = False
            waiting = [trial for trial in visit if (trial not in soup if not replacement else number or trial != visit[0])]
            while waiting and (budget is None or len(told) - 1 < budget):
                following = max(waiting, key=lambda trial: self.by_averaged_logits([*soup, trial])) if prerank else waiting[0]
                waiting.remove(following)
                value = self.of([*soup, following])
                kept = value >= best if accept == "not_worse" else value > best
                if kept:
                    soup, best, kept_some = [*soup, following], value, True
                told.append((following, value, kept, len(soup)))
            if not kept_some:
                break
        return told

    def pruned(self) -> set[str]:
        soup = self.ranked()
        best = self.of(soup)
        for trial in reversed(self.ranked()):
            rest = [other for other in soup if other != trial]
            if rest and self.of(rest) >= best:
                soup, best = rest, self.of(rest)
        return set(soup)


# What is measured against it: files, float32, early rejection, several devices.


class Pot:
    """The pool as files, cooked as the kitchen does it."""

    def __init__(self, folder: Path, naive: Naive, block: int) -> None:
        self.files = {}
        for trial, model in naive.pool.items():
            save_weights(folder / f"{trial}.safetensors", {name: torch.from_numpy(part).float() for name, part in model.items()})
            self.files[trial] = open_weights(folder / f"{trial}.safetensors")
        self.inputs, self.labels, self.block = torch.from_numpy(naive.inputs).float(), torch.from_numpy(naive.labels), block
        self.metric: Any = naive.metric
        self.singles = {trial: self.logits([trial]) for trial in self.files}

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def logits(self, trials: Sequence[str]) -> Tensor:
        return logits(average([self.files[trial] for trial in trials]), self.inputs)

    def accuracy(self, trials: Sequence[str]) -> Accuracy:
        return accuracy(self.logits(trials), self.labels, self.metric)

    def verdict(self, trials: Sequence[str], need: int) -> Verdict:
        state = average([self.files[trial] for trial in trials])
        order = doubtful_first(self.logits(trials[:-1]), len(trials) - 1, self.singles[trials[-1]], self.labels)
        found, whole = examine(lambda numbers: logits(state, self.inputs[numbers]), self.labels, order, need, self.block)
        return found._replace(accuracy=accuracy(whole, self.labels, self.metric)) if whole is not None else found

    def by_averaged_logits(self, soup: Sequence[str], left: Sequence[str]) -> list[str]:
        return by_averaged_logits(self.singles, self.labels, soup, left)


POOLS = st.builds(drawn, seed=st.integers(0, 100_000), trials=st.integers(1, 5), samples=st.integers(4, 40), spread=st.integers(1, 5))
METRICS = st.sampled_from(["accuracy", "accuracy", "macro_f1", "mcc"])


@settings(max_examples=60)
@given(
    pool=POOLS,
    metric=METRICS,
    accept=st.sampled_from(["improve", "not_worse"]),
    passes=st.integers(1, 3),
    replacement=st.booleans(),
    visit_seed=st.none() | st.integers(0, 99),
    prerank=st.booleans(),
    budget=st.none() | st.integers(1, 6),
    block=st.integers(1, 12),
    devices=st.integers(1, 3),
)
def test_greedy_decides_as_the_reference_for_every_option(
    tmp_path_factory: pytest.TempPathFactory, pool: Any, metric: str, accept: Any, passes: int, replacement: bool, visit_seed: int | None,
    prerank: bool, budget: int | None, block: int, devices: int,
) -> None:  # fmt: skip
    naive = Naive(*pool, metric)
    pot = Pot(tmp_path_factory.mktemp("pot"), naive, block)
    held_out = {trial: pot.accuracy([trial]) for trial in naive.pool}
    visit = naive.ranked()
    if visit_seed is not None:
        first, *others = visit
        random.Random(f"stockpot/greedy/{visit_seed}").shuffle(others)
        visit = [first, *others]
    with Speculation([pot.verdict] * devices) as crowd:
        steps = greedy(
            held_out, crowd.score, accept, passes=passes, replacement=replacement, budget=budget, ahead=crowd.ahead,
            order=None if visit_seed is None else shuffled(held_out, visit_seed), rank=pot.by_averaged_logits if prerank else None,
        )  # fmt: skip
    wanted = naive.greedy(visit, accept, passes, replacement, prerank, budget)
    assert [(step.trial_id, step.kept, step.size) for step in steps] == [(trial, kept, size) for trial, _, kept, size in wanted]
    for step, (_, value, _, _) in zip(steps, wanted, strict=True):
        assert_told(step, value)
    soup = [step.trial_id for step in steps if step.kept]
    assert pot.logits(soup).argmax(1).tolist() == naive.answers(soup)
    pot.close()


def assert_told(step: GreedyStep, value: Fraction | float) -> None:
    """The exact value where all was looked at, else a bound that is enough for the decision."""
    if step.exact:
        assert step.after.value == pytest.approx(float(value), abs=1e-12)
    else:
        assert step.before
        assert float(value) <= step.after.value <= step.before.value
        assert not step.kept


@settings(max_examples=20)
@given(pool=POOLS, metric=METRICS)
def test_pruning_decides_as_the_reference(tmp_path_factory: pytest.TempPathFactory, pool: Any, metric: str) -> None:
    naive = Naive(*pool, metric)
    pot = Pot(tmp_path_factory.mktemp("pot"), naive, 8)
    assert set(pruned({trial: pot.accuracy([trial]) for trial in naive.pool}, pot.accuracy)) == naive.pruned()
    pot.close()
