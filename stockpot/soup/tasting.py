"""What is noted of everything a sweep shows: its scores, what they cost (`Kitchen.measured`) and its calibration, all alike, so that
recipes, ensembles and single models stand in one table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stockpot.evaluation import accuracy
from stockpot.outcomes import Accuracy, Calibration, Scores
from stockpot.soup.kitchen import Dish, Kitchen
from stockpot.soup.statistics import calibration_error, temperature

# N samples, C classes

Logits = Callable[[str], Tensor]
"""A split's name to what a model says about its samples (N, C)."""


@dataclass(frozen=True)
class Taste:
    """One row of the table."""

    scores: Scores
    calibration: Calibration


def taste(kitchen: Kitchen, name: str, make: Callable[[], Dish]) -> tuple[Dish, Taste]:
    """Make a dish, score it and calibrate it. Its cost is noted under its name; the two passes that calibration takes where the scores were
    known already are not part of it."""
    with kitchen.measured(name):
        dish = make()
        scores = kitchen.scores(dish)
    return dish, Taste(scores, calibrate(kitchen, partial(kitchen.logits, dish)))


def taste_logits(kitchen: Kitchen, name: str, make: Callable[[], Logits]) -> Taste:
    """The same of what is no dish, an ensemble: its scores and its calibration are of one evaluation a split."""
    told: dict[str, Tensor] = {}

    def score(split: str) -> Accuracy:
        logits_NC = logits(split)
        if split in ("held_out", "gate"):
            told[split] = logits_NC
        return accuracy(logits_NC, kitchen.splits[split].labels, kitchen.metric)

    with kitchen.measured(name):
        logits = make()
        scores = kitchen.scores_by(score)
    return Taste(scores, calibrate(kitchen, told.__getitem__))


def calibrate(kitchen: Kitchen, logits: Logits) -> Calibration:
    """The expected calibration error on the gate split, as it is and with the temperature that held_out asks for."""
    labels = {split: torch.as_tensor(kitchen.splits[split].labels) for split in ("held_out", "gate")}
    found, gate_NC = temperature(logits("held_out"), labels["held_out"]), logits("gate")
    before, after = (calibration_error(one_NC, labels["gate"]) for one_NC in (gate_NC, gate_NC / found))
    return Calibration(before=before, after=after, temperature=found)
