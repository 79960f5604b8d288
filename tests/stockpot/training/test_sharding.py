"""Promise: a trial whose ranks share the model ends with the weights of one process, each rank holding its part of them and of what goes
with them; its training state is that of any trial, and goes on sharded or not."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stockpot.checkpoints import load_weights, save_weights
from stockpot.errors import BadRequest, TrialFailed
from stockpot.settings import TrialSettings
from stockpot.training.candidates import Best, Candidate, finished
from stockpot.training.course import HERE
from stockpot.training.moving_parts import Training
from stockpot.training.ranks import Place, run_on_ranks
from stockpot.training.sharding import Shards, blocks, require_divisible
from stockpot.training.trainer import train
from tests.tiny_training import PREPROCESS, STEPS_PER_EPOCH, Batch, batches, equal, score

BASE = TrialSettings(epochs=2, batch_size=12, learning_rate=2e-3, warmup_steps=0)
EVERYTHING = {
    "adamw": BASE.model_copy(update={"clip_norm": 0.5, "ema_decays": (0.9, 0.5), "micro_batch": 4}),
    "sgd with sam": BASE.model_copy(update={"optimiser": "sgd", "sam_rho": 0.05, "learning_rate": 0.05}),
    "rmsprop by layer": BASE.model_copy(update={"optimiser": "rmsprop", "layer_decay": 0.7, "frozen": ("stem.bias",)}),
    "fp16": BASE.model_copy(update={"optimiser": "sgd", "precision": "fp16", "learning_rate": 0.05}),
    "best of averages": BASE.model_copy(
        update={"optimiser": "sgd", "evaluate_every_steps": 2, "ema_decays": (0.9,), "learning_rate": 0.05}
    ),
}


class Block(nn.Module):
    """A residual block of sizes that two ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(15), nn.Linear(15, 31), nn.Linear(31, 15)

    def forward(self, rows_BD: Tensor) -> Tensor:
        moved_BD: Tensor = rows_BD + self.narrow(functional.gelu(self.wide(self.norm(rows_BD))))
        return moved_BD


class Stack(nn.Module):
    """Blocks as a transformer has them, one that shares a weight with the stem; a buffer; and what a text tower has: frozen blocks that are
    never asked, and a frozen number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks, self.head = nn.Linear(192, 15), nn.ModuleList([Block() for _ in range(3)]), nn.Linear(15, 3)
        self.blocks[2].norm.bias = self.stem.bias
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.text = nn.ModuleList([Block()]).requires_grad_(False)
        self.register_buffer("shift", torch.full((3,), 0.5))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        rows_BD = self.stem(images_B3HW.flatten(1))
        for block in self.blocks:
            rows_BD = block(rows_BD)
        logits_BC: Tensor = self.head(rows_BD) * self.scale + self.shift
        return logits_BC


def trained(settings: TrialSettings, place: Place = HERE, **kwargs) -> dict[float, Candidate]:
    """The candidates of a trial, sharded where there are several ranks."""

    def shares(epoch: int, skip: int) -> Iterator[Batch]:
        for batch in batches(epoch, skip):
            yield Batch(batch.images[place.rank :: place.world], batch.labels[place.rank :: place.world])

    return train(
        Stack(),
        settings,
        shares,
        steps_per_epoch=STEPS_PER_EPOCH,
        preprocess=PREPROCESS,
        device=place.device,
        score=score if place.rank == 0 else None,
        rank=place.rank,
        world=place.world,
        sharded=place.world > 1,
        **kwargs,
    )


def keeping(path: Path, at: int) -> Callable[[int, Callable[[], dict[str, Tensor]]], None]:
    """A checkpoint that stores the state of one step."""

    def checkpoint(step, state):
        if step == at:
            save_weights(path, state())

    return checkpoint


def near(one: dict[float, Candidate], other: dict[float, Candidate], precision: str) -> bool:
    """The same but for the rounding of sums whose parts two ranks add up."""
    tolerance = {"fp32": 1e-5, "fp16": 1e-3}[precision]
    return one.keys() == other.keys() and all(
        one[decay].step == other[decay].step
        and one[decay].weights.keys() == other[decay].weights.keys()
        and all(torch.allclose(tensor, other[decay].weights[name], atol=tolerance) for name, tensor in one[decay].weights.items())
        for decay in one
    )


def courses(folder: Path, place: Place, _told, _log, _say) -> dict[float, Candidate]:
    """What both ranks do: every trial with a state kept on the way, its rest from that state, and from that of one process."""
    require_halves(place)
    for name, settings in EVERYTHING.items():
        made = [trained(settings, place, checkpoint=keeping(folder / f"{name} sharded", at=4))]
        torch.distributed.barrier()
        made += [trained(settings, place, resume=load_weights(folder / f"{name} {kind}")) for kind in ("sharded", "alone")]
        if place.rank == 0:
            for number, candidates in enumerate(made):
                save_weights(folder / f"{name} {number}", finished(candidates))
    return {}


def require_halves(place: Place) -> None:
    """A rank has half of all weights, gradients, moments and averages, but for what two cannot share evenly."""
    model = Stack()
    whole = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    training = Training(model, EVERYTHING["adamw"], PREPROCESS, world=place.world, shards=Shards(model, place.device))
    training.advance(next(batches(0)), 0.01)
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained_here = [*names.values()]
    parts = {
        "weights": trained_here,
        "gradients": [parameter.grad for parameter in trained_here],
        "moments": [training.rule.state[parameter]["exp_avg"] for parameter in trained_here],
        "squares": [training.rule.state[parameter]["exp_avg_sq"] for parameter in trained_here],
        "averages": [training.averages.averages[0.9][name] for name in names],
    }
    for name, tensors in parts.items():
        here = sum(tensor.to_local().numel() for tensor in tensors)
        assert abs(here / whole - 1 / 2) < 0.04, f"{here} of {whole} {name} are here"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What two ranks left of every trial, and one process; both in files."""
    if torch.cuda.device_count() == 1:
        pytest.skip("two ranks need two GPUs, or none")
    folder = tmp_path_factory.mktemp("made")
    for name, settings in EVERYTHING.items():
        save_weights(folder / name, finished(trained(settings, checkpoint=keeping(folder / f"{name} alone", at=4))))
    run_on_ranks(
        2,
        partial(courses, folder),
        tmp_path_factory.mktemp("ranks"),
        told_to_leave=lambda: False,
        log=lambda _metrics, _step: None,
        say=lambda _line: None,
    )
    return folder


def candidates(path: Path, settings: TrialSettings) -> dict[float, Candidate]:
    best = Best()
    best.restore(load_weights(path), (0.0, *settings.ema_decays))
    return best.found


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYTHING)
def test_ranks_that_share_a_model_end_with_the_weights_of_one_process_wherever_their_state_came_from(name, made):
    alone, whole, resumed, taken_over = (
        candidates(made / file, EVERYTHING[name]) for file in (name, f"{name} 0", f"{name} 1", f"{name} 2")
    )
    assert near(whole, alone, EVERYTHING[name].precision)
    assert equal(resumed, whole)
    assert near(taken_over, alone, EVERYTHING[name].precision)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_sharded_state_is_as_that_of_one_process_and_goes_on_there(name, made):
    sharded, alone = (load_weights(made / f"{name} {kind}") for kind in ("sharded", "alone"))
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in sharded.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in alone.items()
    }
    settings = EVERYTHING[name]
    assert near(trained(settings, resume=sharded), candidates(made / name, settings), settings.precision)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_two_gpus_that_share_a_model_end_with_the_weights_of_one(made):
    settings = EVERYTHING["adamw"]
    assert near(candidates(made / "adamw 0", settings), trained(settings, Place(0, 1, "cuda")), "fp32")


def test_blocks_are_cut_each_by_itself_but_one_that_shares_a_weight_with_another_part():
    model = Stack()
    assert [*blocks(model)] == [model.blocks[0], model.blocks[1], model.text[0]]
    layers = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert [*blocks(layers)] == [layers[1], layers[2]]


def test_a_trained_number_is_refused():
    model = Stack()
    model.scale.requires_grad_()
    with pytest.raises(BadRequest, match="`scale` is a single number, which GPUs cannot share; freeze it"):
        require_divisible(model)
    require_divisible(model, {"scale"})


def test_a_rank_out_of_memory_tries_nothing_that_takes_the_others():
    model, passes = Stack(), []

    def full(*_) -> None:
        passes.append(1)
        raise torch.OutOfMemoryError

    model.register_forward_pre_hook(full)
    training = Training(model, BASE, PREPROCESS, world=2, shards=object.__new__(Shards))
    with pytest.raises(TrialFailed, match="Set `micro_batch` to 6, or less"):
        training.advance(next(batches(0)), 0.01)
    assert passes == [1]
