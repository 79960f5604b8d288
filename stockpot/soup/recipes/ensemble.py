"""Ensembles of logits: what averaging outputs instead of weights would reach, at as many times the cost of one model as there are members.
Yardsticks, never shipped (Wortsman et al. 2022, arXiv:2203.05482, section 3).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stockpot.evaluation import accuracy
from stockpot.fields import Metric
from stockpot.soup.recipes.examining import Verdict
from stockpot.soup.recipes.greedy import Accept, greedy, members

# N samples, C classes


def ensemble(logits: Mapping[str, Tensor], trials: Sequence[str]) -> Tensor:
    """Mean logits (N, C) of these trials, summed in float64."""
    return torch.stack([logits[trial].double() for trial in sorted(trials)]).mean(dim=0).float()


def greedy_ensemble(
    logits: Mapping[str, Tensor], labels_N: Tensor, accept: Accept = "improve", metric: Metric = "accuracy"
) -> tuple[str, ...]:
    """Members chosen as greedy chooses soups, on the ensemble's held-out accuracy, or by another metric."""

    def score(trials: Sequence[str], _need: int = 0) -> Verdict:
        return Verdict(accuracy(ensemble(logits, trials), labels_N, metric), len(labels_N))

    return members(greedy({trial: score([trial]).accuracy for trial in logits}, score, accept))
