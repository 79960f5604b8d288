"""BatchNorm statistics estimated again for averaged weights (Izmailov et al. 2018, arXiv:1803.05407, section 3.2): the mean of the models'
running statistics is not the statistics of the mean model's activations.

It can ruin a model, such as one that was trained with its statistics frozen, and is never done unless a request asks for it. torch's
`swa_utils.update_bn` puts the whole model in training mode, so that dropout takes part; here BatchNorm alone is, and the same samples give
the same statistics.
"""

# B batch, S side in pixels

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm modules with running statistics, by name."""
    return {name: one for name, one in model.named_modules() if isinstance(one, _BatchNorm) and one.running_mean is not None}


def statistics(model: nn.Module) -> set[str]:
    """The names of the statistics in the model's state dict."""
    return {f"{name}.{part}" for name in norms(model) for part in STATISTICS}


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the statistics by the mean over these batches (B, 3, S, S), normalised, on the model's device, of their means and their
    unbiased variances, each batch counting the same. The model ends in evaluation mode."""
    found = norms(model).values()
    momenta = [one.momentum for one in found]
    model.eval()
    for one in found:
        one.reset_running_stats()
        one.momentum = None  # torch's way of asking for a plain mean over batches
        one.train()
    for images_B3SS in batches:
        model(images_B3SS)
    for one, momentum in zip(found, momenta, strict=True):
        one.momentum = momentum
    model.eval()
