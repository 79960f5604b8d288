"""How the ingredients lie around their init: lengths of the differences and the angles between them. Models that fine-tuning kept in one
basin differ by small, partly agreeing steps; a pool of strangers shows as right angles and long steps.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stockpot.soup.recipes.averaging import read_tensor
from stockpot.soup.recipes.weights import Weights

# N files


def gram(init: Weights, files: Sequence[Weights]) -> Tensor:
    """Inner products of the files' differences from the init: float64 (N, N). One tensor of every file is in memory at a time."""
    total_NN = torch.zeros(len(files), len(files), dtype=torch.float64)
    for name, slot in init.slots.items():
        if slot.dtype.is_floating_point:
            start = read_tensor(init, name).flatten().double()
            steps_NE = torch.stack([read_tensor(file, name).flatten().double() - start for file in files])
            total_NN += steps_NE @ steps_NE.T
    return total_NN


def angles(gram_NN: Tensor) -> list[list[float]]:
    """Angles between the differences, in degrees (N, N); a difference of length 0 is at 90 to everything but itself."""
    lengths_N = gram_NN.diagonal().sqrt()
    cosines_NN = (gram_NN / (lengths_N[:, None] * lengths_N[None, :])).nan_to_num(0.0).clamp(-1, 1)
    cosines_NN.fill_diagonal_(1.0)
    return [[math.degrees(math.acos(cosine)) for cosine in row] for row in cosines_NN.tolist()]
