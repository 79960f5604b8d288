"""Scoring a candidate soup no longer than its fate is open. Exact: a candidate is lost once it has more errors than it may have, whatever
the order of the samples, and it is never kept without its full count.

Order decides only the cost: samples by ascending true-class margin of (n * soup logits + candidate's own logits) / (n + 1), both on one
scale, so the likely errors come first. A rejection needs (allowed errors + 1) of N samples at the least: the floor. Were the candidate's
logits known beforehand, their margins would come within 1.13 of it in blocks of a sixty-fourth.
"""

# N samples, C classes, B block

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stockpot.evaluation import right
from stockpot.outcomes import Accuracy

Predict = Callable[[Tensor], Tensor]
"""Sample numbers, int64 (B,), to logits (B, C). A sample's logits must not depend on its block."""


class Verdict(NamedTuple):
    """What an examination found."""

    accuracy: Accuracy
    """Exact when `examined` is all; otherwise the most it can be, which is below what was needed."""
    examined: int
    """Samples looked at."""
    passes: int = 0
    """Forward passes of one sample that finding it took: none where it was known already."""


def margins(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """True-class logit minus the largest other, (N,): below zero is wrong."""
    own = logits_NC.gather(1, labels_N[:, None])[:, 0]
    others = logits_NC.scatter(1, labels_N[:, None], -math.inf)
    return own - others.amax(dim=1)


def doubtful_first(soup_NC: Tensor, size: int, candidate_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Sample numbers, the likeliest errors of a soup of `size` with one more ingredient first."""
    return margins((on_scale(soup_NC) * size + on_scale(candidate_NC)) / (size + 1), labels_N).argsort(stable=True)


def on_scale(logits_NC: Tensor) -> Tensor:
    """Logits whose spread over the classes is 1 in the mean: a model trained at a higher rate speaks louder, and knows no more."""
    return logits_NC / logits_NC.std(dim=1).nanmean().clamp(min=torch.finfo(logits_NC.dtype).tiny)


def examine(predict: Predict, labels_N: Tensor, order_N: Tensor, need: int, block: int) -> tuple[Verdict, Tensor | None]:
    """The verdict, and all logits (N, C) in sample order if every sample was looked at.

    need: correct answers that keep the candidate; 0 looks at everything.
    """
    seen = len(labels_N)
    wrong = 0
    rows: list[Tensor] = []
    for numbers in torch.split(order_N, block):
        rows.append(predict(numbers))
        wrong += int((~right(rows[-1], labels_N[numbers])).sum())
        examined = sum(map(len, rows))
        if wrong > seen - need and examined < seen:
            return Verdict(Accuracy(correct=seen - wrong, seen=seen), examined), None
    logits_NC = torch.cat(rows)
    return Verdict(Accuracy(correct=seen - wrong, seen=seen), seen), logits_NC[order_N.argsort()]


def block_size(samples: int) -> int:
    """Samples in one forward pass: a small share of the split, because half a block is wasted on a rejection, within what devices like."""
    return max(32, min(256, math.ceil(samples / 64)))


def floor(steps_need: int, seen: int) -> float:
    """The least share of the split a rejection has to look at."""
    return (seen - steps_need + 1) / seen
