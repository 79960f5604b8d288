"""The moving parts of a trial: weights, optimiser, loss scale, moving averages, step; one optimiser step, and the state of it all.

Every step draws its randomness (mixing, dropout) from (trial seed, step) alone, so a training state holds tensors and a step number.
"""

# B batch, C classes, H height, W width

import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stockpot.checkpoints import first_non_finite
from stockpot.errors import NonFinite, TrialFailed
from stockpot.evaluation import normalise
from stockpot.preparation import Preparation
from stockpot.settings import TrialSettings
from stockpot.training import optimisation
from stockpot.training.candidates import MovingAverages, State, Weights, below, wearing
from stockpot.training.compiling import Compiled
from stockpot.training.fitting import gigabytes, largest_fitting, room_for
from stockpot.training.losses import loss_function, mix, partners, require_mixable
from stockpot.training.sharding import Shards, cut

FEWER_MOMENTS = "`adafactor` keeps hardly any moments and `sgd` one a weight, where the others keep two; `frozen` layers need none."
"""What to do where the optimiser's moments do not fit."""

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Batch(Protocol):
    """One training batch: images uint8 (B, 3, H, W), or tokens int32 (B, L), and labels int64 (B)."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


class Training:
    """A model on its way, from the shared init or from a training state.

    rank, world: this process among those that train the model together, each on its share of every batch; gradients are averaged over
    them. shards: what cut the model over them, if it is cut. Raises `BadRequest` when tokens should be
    mixed.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrialSettings,
        preprocess: Preparation,
        *,
        rank: int = 0,
        world: int = 1,
        shards: Shards | None = None,
    ) -> None:
        require_mixable(settings, preprocess)
        self.model, self.settings, self.preprocess, self.rank, self.shards = model, settings, preprocess, rank, shards
        self.device = next(model.parameters()).device
        self.rule = optimisation.optimiser(model, settings, sharded=shards is not None)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.loss = loss_function(settings)
        part = 1 / world if shards else 1
        trained = gigabytes((parameter for parameter in model.parameters() if parameter.requires_grad), part)
        averages = gigabytes(model.parameters(), 2 * len(settings.ema_decays) * part)
        self._room_for_sam = room_for(f"sharpness-aware minimisation, a copy of {trained} of weights", "Set `sam_rho: 0`.")
        self._room_for_step = room_for(f"the step of {settings.optimiser} beside {trained} of gradients", FEWER_MOMENTS)
        self._room_for_averages = room_for(f"moving averages, {averages} in float64", "Leave a decay out of `ema_decays`.")
        with self._room_for_averages():
            self.averages = MovingAverages(model, settings.ema_decays)
        self.forward: nn.Module = Compiled(model) if settings.compile else model
        if world > 1 and shards is None:
            self.forward = DistributedDataParallel(self.forward)
        self.step = 0

    def advance(self, batch: Batch, rate: float) -> Tensor:
        """One optimiser step; returns its loss, still on the device. Raises `TrialFailed` when memory runs out, naming what fits."""
        try:
            return self._advance(batch, rate)
        except torch.OutOfMemoryError:
            pass  # the exception holds on to what filled the memory; out here that is free again
        raise TrialFailed(self._out_of_memory(batch))

    def _advance(self, batch: Batch, rate: float) -> Tensor:
        settings = self.settings
        rng = random.Random(f"{settings.seed}/{self.step}")
        torch.manual_seed(rng.getrandbits(63) ^ self.rank)  # dropout differs between ranks, the mixing does not
        images_B3HW = normalise(batch.images.to(self.device, non_blocking=True), self.preprocess)
        labels_B = batch.labels.to(self.device, non_blocking=True)
        images_B3HW, share = mix(images_B3HW, settings, rng)
        loss = self._gradients(images_B3HW, labels_B, share)
        if settings.sam_rho > 0:
            with self._room_for_sam():
                before = optimisation.climb(self.model, settings.sam_rho)  # along the gradient, whatever its length: a scaled loss will do
            self._gradients(images_B3HW, labels_B, share)
            optimisation.descend(before)
        optimisation.set_learning_rate(self.rule, rate)
        with self._room_for_step():
            self.scaler.unscale_(self.rule)
            if settings.clip_norm > 0:
                nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
            self.scaler.step(self.rule)
            self.scaler.update()
        self.step += 1
        with self._room_for_averages():
            self.averages.update()
        return loss

    def _gradients(self, images_B3HW: Tensor, labels_B: Tensor, share: float) -> Tensor:
        """Fresh gradients of the batch's mean loss, in as many forward passes as `micro_batch` asks for; returns that loss."""
        self.rule.zero_grad(set_to_none=True)
        size, partners_B = len(labels_B), partners(labels_B)
        piece = self.settings.micro_batch or size
        total = torch.zeros((), device=self.device)
        for start in range(0, size, piece):
            part = slice(start, start + piece)
            with self._shared(last=start + piece >= size):
                with self._autocast():
                    logits_BC = self.forward(images_B3HW[part])
                loss = self.loss(logits_BC.float(), labels_B[part], partners_B[part], share) * (len(logits_BC) / size)
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # as torch left it
            total += loss.detach()
        return total

    def _autocast(self) -> Any:
        kind = AUTOCAST[self.settings.precision]
        return nullcontext() if kind is None else torch.autocast(self.device.type, kind)

    def _shared(self, *, last: bool) -> Any:
        """Ranks share their gradients with the last piece of a batch."""
        return nullcontext() if last or not isinstance(self.forward, DistributedDataParallel) else self.forward.no_sync()

    def _out_of_memory(self, batch: Batch) -> str:
        """The sentence, after trying smaller forward passes until one fits beside the optimiser's moments."""
        self.rule.zero_grad(set_to_none=True)
        tried, size = min(self.settings.micro_batch or len(batch.labels), len(batch.labels)), len(batch.labels)
        found = f"The device ran out of memory at step {self.step + 1} with {tried} images a forward pass (batch of {size})."
        if self.shards and tried > 1:  # to try takes all ranks, and the others may have had room
            return f"{found} Set `micro_batch` to {tried // 2}, or less: the batch, and the result, stay the same."
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        moments = [] if self.rule.state else [torch.empty_like(one) for one in trained for _ in range(2)]

        def attempt(images: int) -> None:
            images_B3HW = normalise(batch.images[:images].to(self.device), self.preprocess)
            with self._autocast():
                loss = self.model(images_B3HW).float().sum()
            torch.autograd.grad(loss, trained)  # not `backward`, which would wait for the other ranks

        fits = largest_fitting(attempt, tried)
        del moments
        if fits is None:
            return f"{found} Not even one image fits: use a device with more memory or a smaller model."
        return f"{found} Measured: {fits} fit. Set `micro_batch` to {fits}: the batch, and the result, stay the same."

    def end(self) -> None:
        """Give back the memory of gradients and moments: nothing moves any more."""
        self.rule.zero_grad(set_to_none=True)
        self.rule.state.clear()

    def state(self) -> State:
        """Everything a further attempt needs, as tensors: no pickle is ever written. Raises `NonFinite` rather than give a broken one."""
        moments = {
            f"optimiser.{number}.{name}": tensor
            for number, values in self.rule.state_dict()["state"].items()
            for name, tensor in values.items()
            if tensor is not None
        }
        weights = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        scale = {f"scaler.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.scaler.state_dict().items()}
        state = {"step": torch.tensor(self.step), **weights, **moments, **scale, **self.averages.state()}
        state = self.shards.gathered(state) if self.shards else state
        require_finite(below(state, "model."), self.step, self.settings)
        return state

    def restore(self, state: State) -> None:
        """Go back to a state."""
        self.step = int(state["step"])
        self.load(below(state, "model."))
        trained = [parameter for group in self.rule.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in below(state, "optimiser.").items():
            number, _, key = name.partition(".")
            moments.setdefault(int(number), {})[key] = cut(tensor, trained[int(number)])
        self.rule.load_state_dict({"state": moments, "param_groups": self.rule.state_dict()["param_groups"]})
        if scale := {name: value.item() for name, value in below(state, "scaler.").items()}:
            counts = {"growth_interval", "_growth_tracker"}
            self.scaler.load_state_dict({name: int(value) if name in counts else value for name, value in scale.items()})
        self.averages.restore({name: cut(state[name], like) for name, like in self.averages.state().items()})

    def load(self, weights: Weights) -> None:
        """Put whole weights into the model."""
        own = self.model.state_dict()
        self.model.load_state_dict({name: cut(tensor, own.get(name, tensor)) for name, tensor in weights.items()})

    @property
    def sees_whole(self) -> bool:
        """Whether `wearing` shows the whole model on this rank."""
        return self.shards is None or self.shards.first

    def wearing(self, weights: Weights) -> AbstractContextManager[nn.Module]:
        """The whole model with other weights, as long as it is looked at."""
        return wearing(self.model, weights) if self.shards is None else self.shards.wearing(weights)


def require_finite(weights: Weights, step: int, settings: TrialSettings) -> None:
    """Raises `NonFinite` naming the first weight that is no number."""
    name = first_non_finite(weights)
    if name is not None:
        raise NonFinite(f"Weights stopped being numbers by step {step}: `{name}`. Lower `learning_rate` {settings.learning_rate:g}.")
