"""Model Stock (Jang et al. 2024, arXiv:2403.19522): pull the mean back towards the init, tensor by tensor, by how much the ingredients
agree. No evaluation is needed. With N ingredients at a mean pairwise angle theta, seen from the init, the share of the mean is
t = N cos(theta) / (1 + (N - 1) cos(theta)).

Tensors of one number or of integers keep the mean. At most N + 2 tensors are in memory, never N models.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stockpot.soup.recipes.averaging import average, read_tensor
from stockpot.soup.recipes.weights import Weights

# N files


def model_stock(init: Weights, files: Sequence[Weights]) -> dict[str, Tensor]:
    """The state dict. One ingredient alone is returned as it is. Raises `IngredientMismatch` as `average` does."""
    mean = average(files)
    for name, slot in files[0].slots.items():
        if len(files) > 1 and slot.dtype.is_floating_point and mean[name].numel() > 1:
            start = read_tensor(init, name).double()
            share = ratio(agreement(start, files, name), len(files))
            mean[name].copy_(start.lerp_(mean[name].double(), share))
    return mean


def agreement(start: Tensor, files: Sequence[Weights], name: str) -> float:
    """Mean pairwise cosine of the files' differences from the start, by the length of the sum of unit vectors; 0 where one did not move."""
    total = torch.zeros_like(start)
    for file in files:
        step = read_tensor(file, name).double() - start
        length = step.norm()
        if length == 0:
            return 0.0
        total += step / length
    count = len(files)
    return float((total.square().sum() - count) / (count * (count - 1)))


def ratio(cosine: float, count: int) -> float:
    """The mean's share t, in [0, 1]."""
    cosine = min(max(cosine, 0.0), 1.0)
    return count * cosine / (1 + (count - 1) * cosine)
