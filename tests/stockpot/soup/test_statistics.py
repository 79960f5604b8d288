"""Guards: the paired test is the exact one (by counting every sequence of coin flips on small samples), the interval is the paired
bootstrap, and calibration is measured and repaired as defined."""

from itertools import product

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from stockpot.evaluation import accuracy, right
from stockpot.outcomes import Accuracy
from stockpot.soup.statistics import bootstrap, calibration_error, mcnemar, temperature


def counted(won: int, lost: int) -> float:
    """The oracle: the share of all sequences at least as uneven."""
    flips = list(product([0, 1], repeat=won + lost))
    return sum(abs(2 * sum(flip) - len(flip)) >= abs(won - lost) for flip in flips) / len(flips)


@given(won=st.integers(0, 5), lost=st.integers(0, 5), both=st.integers(0, 3))
def test_mcnemar_counts_discordant_samples_exactly(won: int, lost: int, both: int) -> None:
    before = torch.tensor([True] * lost + [False] * won + [True] * both, dtype=torch.bool)
    after = torch.tensor([False] * lost + [True] * won + [True] * both, dtype=torch.bool)
    assert abs(mcnemar(before, after) - counted(won, lost)) < 1e-12


def test_the_first_of_equal_logits_is_the_answer() -> None:
    assert right(torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0])).tolist() == [True, False]
    nan = float("nan")
    assert right(torch.tensor([[nan, 0.0], [0.0, nan], [nan, nan]]), torch.tensor([0, 1, 0])).tolist() == [False] * 3


def test_a_row_that_is_no_number_is_an_answer_that_is_wrong() -> None:
    nan = float("nan")
    logits, labels = torch.tensor([[nan, nan], [nan, 3.0], [4.0, 0.0]]), torch.tensor([0, 1, 0])
    assert right(logits, labels).tolist() == [False, False, True]
    assert accuracy(logits, labels) == Accuracy(correct=1, seen=3)
    assert abs(accuracy(logits, labels, "macro_f1").other - 1 / 3) < 1e-9  # class 0: 1 of 2 found; class 1: 0 of 1
    assert calibration_error(logits, labels) > 0.6
    assert temperature(logits, labels) == temperature(logits[2:], labels[2:])
    assert temperature(logits[:2], labels[:2]) == 1.0


def test_the_bootstrap_interval_is_that_of_resampled_pairs() -> None:
    rng = torch.Generator().manual_seed(0)
    before, after = (torch.rand(300, generator=rng) < share for share in (0.80, 0.86))
    gains = after.double() - before.double()
    drawn = torch.stack([gains[torch.randint(300, (300,), generator=rng)].mean() for _ in range(4000)])
    low, high = bootstrap(before, after)
    assert abs(low - float(drawn.quantile(0.025))) < 0.01
    assert abs(high - float(drawn.quantile(0.975))) < 0.01
    assert bootstrap(before, before) == (0.0, 0.0)


def test_the_bootstrap_interval_leaves_a_fortieth_of_all_resamples_on_either_side() -> None:
    """The oracle: the distribution of the gain of a resample, as the n-fold convolution of that of one sample."""
    before, after = torch.tensor([True] * 700 + [False] * 300), torch.tensor([True] * 600 + [False] * 200 + [True] * 200)
    sums = np.array([1.0])
    for _ in range(1000):
        sums = np.convolve(sums, [0.1, 0.7, 0.2])  # 100 of 1,000 lost, 200 won
    gains, below = np.arange(-1000, 1001) / 1000, np.cumsum(sums)
    low, high = (float(np.interp(end, gains, below)) for end in bootstrap(before, after))
    assert abs(low - 0.025) < 0.004
    assert abs(high - 0.975) < 0.004


@given(seed=st.integers(0, 10**6), samples=st.integers(1, 60), loud=st.floats(0.1, 8))
def test_calibration_error_is_the_gap_of_fifteen_bins_of_confidence(seed: int, samples: int, loud: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits, labels = loud * torch.randn(samples, 4, generator=rng), torch.randint(4, (samples,), generator=rng)
    sure, answers = (one.tolist() for one in logits.double().softmax(1).max(1))
    bins = [[(one, answer == label) for one, answer, label in zip(sure, answers, labels.tolist(), strict=True)
             if place / 15 <= one < (place + 1) / 15 or (one == 1 and place == 14)] for place in range(15)]  # fmt: skip
    gaps = [abs(sum(one for one, _ in inside) - sum(hit for _, hit in inside)) for inside in bins]
    assert sum(map(len, bins)) == samples
    assert abs(calibration_error(logits, labels) - sum(gaps) / samples) < 1e-9


def test_calibration_error_of_a_known_case_and_its_repair() -> None:
    labels = torch.tensor([0] * 75 + [1] * 25)
    sure = torch.tensor([[4.0, 0.0]]).expand(100, 2)
    confidence = float(torch.tensor([4.0, 0.0], dtype=torch.float64).softmax(0)[0])
    assert abs(calibration_error(sure, labels) - (confidence - 0.75)) < 1e-12
    assert calibration_error(sure / temperature(sure, labels), labels) < 1e-3
