"""Guards: the paired test is the exact one, by counting every sequence of coin flips on small samples."""

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from stockpot.statistics import mcnemar, right


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
