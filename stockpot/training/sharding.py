"""A model that no device has to hold while it trains: every rank keeps its share of each weight, gradient, moment and moving average, and
has a block whole only while that computes (PyTorch's FSDP2, `fully_shard`; Zhao et al. 2023, arXiv:2304.11277).

What enters and leaves is whole and plain, so a training state or a candidate does not tell how its trial ran. To gather takes every rank;
what is gathered, the first one keeps.
"""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from stockpot.errors import BadRequest
from stockpot.training.candidates import Checkpoint, State, Weights, own_tensors


class Shards:
    """A model of which this rank holds a share from now on. Raises `BadRequest` for one that cannot be cut.

    device: its kind is that of every rank's own device, where blocks arrive one after the other.
    """

    def __init__(self, model: nn.Module, device: str | torch.device) -> None:
        require_divisible(model)
        numbers = {parameter for parameter in model.parameters() if parameter.ndim == 0}
        self.model, self.device = model, torch.device(device)
        self.first = distributed.get_rank() == 0
        self.whole = copy.deepcopy(model) if self.first else None
        """What is evaluated, and becomes a candidate; on the CPU otherwise."""
        mesh = init_device_mesh(self.device.type, (distributed.get_world_size(),))
        for part in (*blocks(model), model):
            fully_shard(part, mesh=mesh, ignored_params=numbers)

    def agreed(self, checkpoint: Checkpoint) -> Checkpoint:
        """The first rank's checkpoint. All ranks give their part of a state it asks for: after every step they hear whether it does."""

        def decide(step: int, state: Callable[[], State]) -> None:
            def asked() -> State:
                self._tell(1)
                return state()

            checkpoint(step, asked)
            self._tell(0)

        def follow(_step: int, state: Callable[[], State]) -> None:
            while self._tell(0).item():
                state()

        return decide if self.first else follow

    @torch.no_grad()
    def gathered(self, tensors: State) -> State:
        """The whole tensors, on the CPU, on the first rank; nothing on the others."""
        found: State = {}
        for name, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.first:
                found[name] = whole.cpu()
        return found

    @contextmanager
    def wearing(self, weights: Weights) -> Iterator[nn.Module]:
        """The whole model with other weights, as `candidates.wearing`, on the first rank; elsewhere the shares as they are."""
        gathered = self.gathered({**own_tensors(self.model), **weights})
        if self.whole is None:
            yield self.model
            return
        self.whole.load_state_dict(gathered, strict=False)
        try:
            yield self.whole
        finally:
            self.whole.cpu()

    def _tell(self, word: int) -> Tensor:
        """The first rank's word, on every rank."""
        told = torch.tensor(word, device=self.device)
        distributed.broadcast(told, 0)
        return told


def require_divisible(model: nn.Module, frozen: Collection[str] = ()) -> None:
    """Raises `BadRequest` for a trained parameter that is a single number, but for `frozen` ones."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0 and parameter.requires_grad and name not in frozen:
            raise BadRequest(f"The parameter `{name}` is a single number, which GPUs cannot share; freeze it, or leave `sharded` out.")


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a whole tensor, where it is to take the place of one that is cut; else the tensor."""
    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the model's outermost lists of modules, such as a transformer's blocks, that have parameters of their own. What shares
    one with another part stays with the rest of the model."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))

    def below(part: nn.Module) -> Iterator[nn.Module]:
        for child in part.children():
            if not isinstance(part, nn.ModuleList | nn.Sequential) or isinstance(child, nn.ModuleList | nn.ModuleDict):
                yield from below(child)
            elif {uses[id(parameter)] for parameter in child.parameters()} == {1}:
                yield child

    return below(model)
