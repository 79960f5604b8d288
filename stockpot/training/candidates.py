"""What a trial may leave as ingredients: its own weights and moving averages of them, the last of each or the best seen.

A candidate is named by the decay of its average; 0 is the trained weights themselves, which is what an average of decay 0 would be.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stockpot.outcomes import Accuracy
from stockpot.training.journal import FINISHED

Weights = dict[str, Tensor]
State = dict[str, Tensor]
Score = Callable[[nn.Module], Accuracy]
"""A model's accuracy on held_out."""
Checkpoint = Callable[[int, Callable[[], State]], None]
"""Called after every step with the number of steps done and a function that gives the state; whoever keeps states decides when."""


@dataclass(frozen=True)
class Candidate:
    """Weights that may become an ingredient."""

    weights: Weights
    """Every tensor of the model's state dict, on the CPU."""
    step: int
    """Optimiser steps behind them."""


class MovingAverages:
    """Moving averages of a model's floating tensors, one set for each decay: average = decay * average + (1 - decay) * weights.

    In float64, at twice the memory of the weights a decay: in float32 a step of (1 - decay) of a small difference is less than half of the
    last digit, and an average of decay 0.9999 or more stands still.
    """

    def __init__(self, model: nn.Module, decays: tuple[float, ...]) -> None:
        self._tracked = {name: tensor for name, tensor in own_tensors(model).items() if tensor.is_floating_point()} if decays else {}
        self.averages = {decay: {name: tensor.detach().double() for name, tensor in self._tracked.items()} for decay in decays}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of one more step in."""
        for decay, average in self.averages.items():
            torch._foreach_mul_(_here(average), decay)
            torch._foreach_add_(_here(average), _here(self._tracked), alpha=1 - decay)

    def state(self) -> State:
        """As part of a training state."""
        return {f"ema.{decay!r}.{name}": tensor for decay, average in self.averages.items() for name, tensor in average.items()}

    def restore(self, state: State) -> None:
        """Go back to a training state."""
        for decay, average in self.averages.items():
            for name, tensor in average.items():
                tensor.copy_(state[f"ema.{decay!r}.{name}"])


class Best:
    """The best weights of each candidate so far, kept on the CPU: the highest accuracy, the earlier of equals."""

    def __init__(self) -> None:
        self.found: dict[float, Candidate] = {}
        self.correct: dict[float, int] = {}

    def offer(self, decay: float, step: int, correct: int, model: nn.Module) -> None:
        """Keep the weights the model has now if none before had as many right answers."""
        if correct > self.correct.get(decay, -1):
            self.found[decay], self.correct[decay] = Candidate(on_cpu(model), step), correct

    def state(self) -> State:
        """As part of a training state."""
        state: State = {}
        for decay, one in self.found.items():
            state[f"best.{decay!r}.step"] = torch.tensor(one.step)
            state[f"best.{decay!r}.correct"] = torch.tensor(self.correct[decay])
            state |= {f"best.{decay!r}.weights.{name}": tensor for name, tensor in one.weights.items()}
        return state

    def restore(self, state: State, decays: tuple[float, ...]) -> None:
        """Go back to a training state."""
        for decay in decays:
            found = below(state, f"best.{decay!r}.")
            if found:
                self.found[decay] = Candidate(below(found, "weights."), int(found["step"]))
                self.correct[decay] = int(found["correct"])


def finished(candidates: dict[float, Candidate]) -> State:
    """What a training came to, as a training state."""
    best = Best()
    for decay, one in candidates.items():
        best.found[decay], best.correct[decay] = one, 0
    state: State = {"step": torch.tensor(FINISHED), **best.state()}
    for decay, one in candidates.items():
        state |= {f"ema.{decay!r}.{name}" if decay else f"model.{name}": tensor for name, tensor in one.weights.items()}
    return state


@contextmanager
def wearing(model: nn.Module, weights: Weights) -> Iterator[nn.Module]:
    """The model with other weights, rounded to its own precision, while the block runs. Storage changes hands and comes back: its own are
    not copied."""
    own = own_tensors(model)
    worn = {name: tensor.detach().to(own[name].dtype, copy=True) for name, tensor in weights.items()}

    def swap() -> None:
        for name, tensor in worn.items():
            own[name].data, tensor.data = tensor.data, own[name].data

    swap()
    try:
        yield model
    finally:
        swap()


def on_cpu(model: nn.Module) -> Weights:
    """A copy of the model's state dict."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def below(state: State, prefix: str) -> State:
    """The part of a state under a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def own_tensors(model: nn.Module) -> Weights:
    """The model's parameters and stored buffers, each once: a tied tensor goes by its first name."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if first.setdefault(id(tensor), name) == name}


def _here(tensors: Weights) -> list[Tensor]:
    """What this rank holds of the tensors: its share of one that is cut over all ranks."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors.values()]
