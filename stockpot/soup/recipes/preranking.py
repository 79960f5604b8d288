"""Pre-ranking by averaged logits, after RADIN (Menes and Risser-Maroix 2024, arXiv:2401.17790): around one init, to first order, the mean
of the models' logits is what the mean model says, and every ingredient's held-out logits are stored. So a candidate can be tried out
without a forward pass. The paper scores the subsets that rank best; here greedy visits first the candidates that rank best beside the soup
so far, so that a budget of few visits goes to the likeliest. It decides the order alone: what is kept, the real soup's count decides.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stockpot.evaluation import right

# N samples of held_out, C classes


def by_averaged_logits(logits: Mapping[str, Tensor], labels_N: Tensor, soup: Sequence[str], left: Sequence[str]) -> list[str]:
    """`left`, those first whose logits (N, C), averaged with those of the soup's members, have most right answers; ties stay as they are.

    soup: trial ids; one named twice counts twice. Sums are float64 and in the order of the ids, so the order of arguments changes nothing.
    """
    total_NC = torch.stack([logits[trial].double() for trial in sorted(soup)]).sum(dim=0)
    correct = {trial: int(right(total_NC + logits[trial].double(), labels_N).sum()) for trial in left}
    return sorted(left, key=lambda trial: -correct[trial])
