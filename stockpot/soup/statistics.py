"""The statistics behind a decision: paired comparison of two models on the same samples, and calibration. Tensors in, numbers out."""

# N samples, C classes

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional

from stockpot.evaluation import right


def mcnemar(right_before_N: Tensor, right_after_N: Tensor) -> float:
    """Two-sided p-value of the exact McNemar test (McNemar 1947): are the samples only one model gets right split evenly?

    Both: bool (N,), the same samples in the same order. 1.0 where the models never differ.
    """
    lost, won = _discordant(right_before_N, right_after_N)
    return float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def bootstrap(
    right_before_N: Tensor, right_after_N: Tensor, *, draws: int = 20_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the accuracy gained (Efron 1979), samples drawn in pairs. A sample's gain is -1, 0 or 1, so drawing samples
    with replacement is drawing three counts."""
    seen = len(right_before_N)
    lost, won = _discordant(right_before_N, right_after_N)
    counts = np.random.default_rng(seed).multinomial(seen, [lost / seen, won / seen, (seen - lost - won) / seen], size=draws)
    low, high = np.quantile((counts[:, 1] - counts[:, 0]) / seen, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def calibration_error(logits_NC: Tensor, labels_N: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599): mean gap of confidence and accuracy over equal-width bins.

    A row with a NaN counts as an answer that is certain and wrong.
    """
    confidence_N = logits_NC.double().softmax(dim=1).amax(dim=1).nan_to_num(nan=1.0)
    bin_N = (confidence_N * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, bin_N, right(logits_NC, labels_N).double() - confidence_N)
    return float(gaps.abs().sum() / len(labels_N))


def temperature(logits_NC: Tensor, labels_N: Tensor) -> float:
    """The temperature in [0.05, 20] that minimises the cross-entropy of logits / temperature; rows with a NaN are left out."""
    sound_N = ~logits_NC.isnan().any(dim=1)
    logits_NC, labels_N = logits_NC[sound_N], labels_N[sound_N]
    if not len(labels_N):
        return 1.0

    def loss(log_temperature: float) -> float:
        return float(functional.cross_entropy(logits_NC.double() / np.exp(log_temperature), labels_N))

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def _discordant(right_before_N: Tensor, right_after_N: Tensor) -> tuple[int, int]:
    """Samples lost and won."""
    return int((right_before_N & ~right_after_N).sum()), int((~right_before_N & right_after_N).sum())
