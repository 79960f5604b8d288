"""Learned mixing (Wortsman et al. 2022, arXiv:2203.05482, section 3.1 and appendix I): a weight per ingredient, or per ingredient and
layer, found by gradient descent on samples set apart, with a temperature beside them.

The paper holds every model in memory. Here it is one model, one gradient and one tensor, whatever the pool: the mixture is a sum, so the
gradient for a weight is the inner product of the mixture's own gradient with that ingredient, and both are streamed from the files.

Ignores integer tensors (copied, as in the plain mean) and gives buffers such as BatchNorm statistics the weights of their layer.
"""

# L layers, N files, B batch, C classes

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from stockpot.soup.recipes.averaging import copied, read_tensor
from stockpot.soup.recipes.weights import Weights

Shares = Mapping[str, Sequence[float]]
"""Layer to the weight of each file; they sum to 1. The layer "" is every tensor that has none of its own."""


def layer_of(name: str) -> str:
    """The layer a tensor belongs to: its name up to the first number (`body.transformer.resblocks.3`), else without its last part."""
    parts = name.split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if numbered is None else parts[: numbered + 1])


def mixed(files: Sequence[Weights], shares: Shares) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of the mixture, summed in float64 and rounded once; one tensor is in memory at a time. Tied names come last."""
    for name, slot in files[0].slots.items():
        if slot.dtype.is_floating_point:
            total = torch.zeros(slot.shape, dtype=torch.float64)
            for file, share in zip(files, _shares(shares, name), strict=True):
                total.add_(read_tensor(file, name), alpha=share)
            yield name, total.to(slot.dtype)
        else:
            yield name, copied(files, name)


def mixture(files: Sequence[Weights], shares: Shares) -> dict[str, Tensor]:
    """The state dict of the mixture, as it ships."""
    state = dict(mixed(files, shares))
    return state | {name: state[first] for name, first in files[0].tied.items()}


def learn(
    model: nn.Module, files: Sequence[Weights], batches: Iterable[tuple[Tensor, Tensor]], *, by_layer: bool, learning_rate: float
) -> dict[str, tuple[float, ...]]:
    """The shares that lower the cross-entropy of logits * exp(t), started from the plain mean; AdamW without weight decay, as the paper's.

    batches: images ready for the model and labels (B,), on its device, as often as there shall be steps. The model ends as some mixture.
    """
    layers = sorted({layer_of(name) for name in files[0].slots}) if by_layer else [""]
    raw_LN = torch.zeros(len(layers), len(files), dtype=torch.float64, requires_grad=True)
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.AdamW([raw_LN, log_temperature], lr=learning_rate, weight_decay=0)
    model.eval()
    for images_B, labels_B in batches:
        shares_LN = raw_LN.softmax(dim=1)
        put(model, files, dict(zip(layers, shares_LN.tolist(), strict=True)))
        optimiser.zero_grad()
        model.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(images_B).double() * log_temperature.exp().to(labels_B.device), labels_B)
        torch.autograd.backward(loss)
        torch.autograd.backward(shares_LN, pulls(model, files, layers))
        optimiser.step()
    model.zero_grad(set_to_none=True)
    return {layer: tuple(row) for layer, row in zip(layers, raw_LN.softmax(dim=1).tolist(), strict=True)}


@torch.no_grad()
def put(model: nn.Module, files: Sequence[Weights], shares: Shares) -> None:
    """Make the model the mixture, in place."""
    own = model.state_dict()  # views of the parameters and buffers
    for name, tensor in mixed(files, shares):
        own[name].copy_(tensor)


@torch.no_grad()
def pulls(model: nn.Module, files: Sequence[Weights], layers: Sequence[str]) -> Tensor:
    """Gradient of the loss for each layer's weight of each file, (L, N), from the gradients the model holds: <dL/dtheta, theta_i>."""
    found_LN = torch.zeros(len(layers), len(files), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in files[0].slots:
            gradient = parameter.grad.flatten().double().cpu()
            row = layers.index(layer_of(name)) if layers != [""] else 0
            for number, file in enumerate(files):
                found_LN[row, number] += gradient @ read_tensor(file, name).flatten().double()
    return found_LN


def _shares(shares: Shares, name: str) -> Sequence[float]:
    return shares[""] if "" in shares else shares[layer_of(name)]
