"""When a sweep has had enough: what one more trial is expected to add, from the held-out logits that the finished trials stored.

The soups of `marginal` need everybody's weights and a forward pass for each candidate. A sweep's parent has no GPU, so greedy *ensembles*
stand in for them: averaging stored logits takes neither weights nor images. Models that may be souped lie close together, and there the
logits of averaged weights and the average of logits agree to first order (Wortsman et al. 2022, arXiv:2203.05482, section 4); where they
part, the ensemble is the better on held_out (there, table 3), so that the estimate errs towards another trial.

A point of the curve is the mean over `CHOICES` random choices of so many finished trials: they were drawn independently, so each choice
is as good a sample as the first so many, and a single one is too jumpy to stop on. Ignores ingredients of earlier sweeps, and the further
options of greedy.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from torch import Tensor

from stockpot.checkpoints import load_weights
from stockpot.config import StopSpec, Sweep
from stockpot.errors import IngredientMismatch
from stockpot.evaluation import accuracy
from stockpot.fields import Metric
from stockpot.ledger import tracking
from stockpot.outcomes import Accuracy, Enough, Ingredient
from stockpot.soup import marginal
from stockpot.soup.recipes.greedy import Accept, ranked

# N samples of held_out, C classes

CHOICES = 8
"""Random choices of trials behind a point of the curve."""

Logits = Mapping[str, Tensor]
"""Ingredient id to its logits (N, C)."""


def judge(sweep: Sweep, rule: StopSpec, folder: Path) -> Enough | None:
    """`Enough` when one more trial is expected to add less than the rule asks for; None to go on.

    folder: where logits that were fetched once lie for the next call. An ingredient whose logits are not what was recorded is left out.
    """
    trials: dict[int, dict[str, Tensor]] = {}
    seconds: dict[int, float] = {}
    labels_N = None
    for one in tracking.find_ingredients(sweep):
        if stored := _stored(one, folder):
            trials.setdefault(one.index, {})[one.trial_id] = stored["logits"]
            seconds[one.index] = one.seconds * one.gpus
            labels_N = stored["labels"]
    if labels_N is None:
        return None
    soups = ensembles(list(trials.values()), labels_N, sweep.request.soup.accept, sweep.request.soup.metric)
    points = marginal.curve(soups, [sum(seconds.values()) / len(seconds)] * len(seconds))  # a choice of trials costs the mean of all
    return marginal.enough(points, rule)


def ensembles(
    trials: Sequence[Logits], labels_N: Tensor, accept: Accept = "improve", metric: Metric = "accuracy"
) -> list[tuple[int, Accuracy]]:
    """(number of trials, the mean accuracy of the greedy ensemble of so many) at the sizes of `marginal`: counts are sums over choices,
    another metric is their mean.

    trials: each with all the ingredients it left.
    """
    own = {name: accuracy(logits_NC, labels_N, metric) for one in trials for name, logits_NC in one.items()}
    points = []
    for count in marginal.sizes(len(trials)):
        found = [_greedy([trials[place] for place in some], own, labels_N, accept, metric) for some in _choices(len(trials), count)]
        points.append((count, _mean(found)))
    return points


def _choices(trials: int, count: int) -> list[list[int]]:
    if count == trials:
        return [list(range(trials))]
    return [random.Random(f"stockpot/sufficiency/{number}").sample(range(trials), count) for number in range(CHOICES)]


def _mean(found: Sequence[Accuracy]) -> Accuracy:
    others = [one.other for one in found if one.other is not None]
    return Accuracy(correct=sum(one.correct for one in found), seen=sum(one.seen for one in found), other=fmean(others) if others else None)


def _greedy(trials: Sequence[Logits], own: Mapping[str, Accuracy], labels_N: Tensor, accept: Accept, metric: Metric) -> Accuracy:
    """The accuracy of the ensemble that greedy chooses in one pass; a sum of logits has the answers of their mean."""
    logits = {name: logits_NC for one in trials for name, logits_NC in one.items()}
    first, *others = ranked({name: own[name] for name in logits})
    sum_NC, best = logits[first], own[first]
    for name in others:
        tried_NC = sum_NC + logits[name]
        after = accuracy(tried_NC, labels_N, metric)
        if after.value > best.value or (accept == "not_worse" and after.value == best.value):
            sum_NC, best = tried_NC, after
    return best


def _stored(ingredient: Ingredient, folder: Path) -> dict[str, Tensor]:
    """What the ingredient says about held_out, with the labels; empty when that is not what was recorded."""
    try:
        return load_weights(tracking.fetch_logits(ingredient, folder))
    except IngredientMismatch:
        return {}
