"""What the shipped soup is compared with, when the request asks: other recipes, ensembles, the line to the init, and how the pool lies
around it.

Nothing here ships and nothing here is selected on. Each name is one of `SoupSpec.compare`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from stockpot.config import Init, SoupSpec
from stockpot.outcomes import Accuracy, AlphaPoint
from stockpot.soup.basins import midpoints
from stockpot.soup.dishes import on_line, prune, stock
from stockpot.soup.kitchen import Dish, Kitchen
from stockpot.soup.recipes.ensemble import ensemble, greedy_ensemble
from stockpot.soup.recipes.geometry import angles, gram
from stockpot.soup.recipes.interpolation import ALPHAS
from stockpot.soup.tasting import Logits, Taste, taste, taste_logits

Recipes = Mapping[str, Sequence[str]]
"""`best_single`, `uniform` and `greedy` to their trials."""


@dataclass(frozen=True)
class Comparison:
    """What was asked for, empty where it was not."""

    tastes: dict[str, Taste] = field(default_factory=dict)
    alphas: dict[str, tuple[AlphaPoint, ...]] = field(default_factory=dict)
    angles: dict[str, tuple[float, ...]] = field(default_factory=dict)
    midpoints: dict[str, Accuracy] = field(default_factory=dict)


def compare(kitchen: Kitchen, init: Init, recipes: Recipes, spec: SoupSpec) -> Comparison:
    """Make and score everything in `spec.compare`."""
    dishes: dict[str, Callable[[], Dish]] = {
        "pruned": lambda: prune(kitchen),
        "learned": lambda: kitchen.learned(spec.mixing, by_layer=False),
        "learned_by_layer": lambda: kitchen.learned(spec.mixing, by_layer=True),
        "model_stock": lambda: stock(kitchen, init),
    }
    ensembles: dict[str, Callable[[], Logits]] = {
        "ensemble": lambda: _ensemble(kitchen, tuple(kitchen.pool.candidates)),
        "greedy_ensemble": lambda: _ensemble(kitchen, _ensemble_members(kitchen, spec)),
    }
    tastes: dict[str, Taste] = {}
    for name in spec.compare:
        if name in dishes and name != spec.recipe:
            tastes[name] = taste(kitchen, name, dishes[name])[1]
        elif name in ensembles:
            tastes[name] = taste_logits(kitchen, name, ensembles[name])
    return Comparison(
        tastes,
        {name: _line(kitchen, init, trials) for name, trials in recipes.items()} if "wise_ft" in spec.compare else {},
        _angles(kitchen) if "angles" in spec.compare else {},
        midpoints(kitchen) if "midpoints" in spec.compare else {},
    )


def _ensemble_members(kitchen: Kitchen, spec: SoupSpec) -> tuple[str, ...]:
    own = {trial: one.logits for trial, one in kitchen.pool.candidates.items()}
    return greedy_ensemble(own, torch.as_tensor(kitchen.splits["held_out"].labels), spec.accept, kitchen.metric)


def _ensemble(kitchen: Kitchen, trials: Sequence[str]) -> Logits:
    return lambda split: ensemble({trial: kitchen.logits(kitchen.soup([trial]), split) for trial in trials}, trials)


def _line(kitchen: Kitchen, init: Init, trials: Sequence[str]) -> tuple[AlphaPoint, ...]:
    return tuple(AlphaPoint(alpha=alpha, scores=kitchen.scores(on_line(kitchen, init, trials, alpha))) for alpha in ALPHAS)


def _angles(kitchen: Kitchen) -> dict[str, tuple[float, ...]]:
    pool = kitchen.pool.candidates
    rows = angles(gram(kitchen.pool.start, [one.weights for one in pool.values()]))
    return {trial: tuple(round(angle, 2) for angle in row) for trial, row in zip(pool, rows, strict=True)}
