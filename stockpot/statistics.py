"""The statistics behind a decision: paired tests on the same samples. Counts in, numbers out."""

# N samples, C classes

from scipy.stats import binomtest
from torch import Tensor


def mcnemar(right_before_N: Tensor, right_after_N: Tensor) -> float:
    """Two-sided p-value of the exact McNemar test (McNemar 1947): are the samples only one model gets right split evenly?

    Both: bool (N,), the same samples in the same order. 1.0 where the models never differ.
    """
    lost = int((right_before_N & ~right_after_N).sum())
    won = int((~right_before_N & right_after_N).sum())
    return float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def right(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Which samples a model gets right: bool (N,). The first of equal logits is the answer."""
    return logits_NC.argmax(dim=1) == labels_N
