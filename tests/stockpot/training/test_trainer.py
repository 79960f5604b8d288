"""Promise: a trial learns; a state taken after any step, stored and loaded, leads to bit-identical weights; micro-batches change memory,
not results."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stockpot.checkpoints import load_weights, save_weights
from stockpot.settings import TrialSettings
from stockpot.training.candidates import Candidate
from stockpot.training.optimisation import learning_rate
from stockpot.training.trainer import total_steps, train
from tests.tiny_training import PREPROCESS, STEPS_PER_EPOCH, Batch, batches, equal, run, tiny

EVERYTHING = {
    "plain": TrialSettings(epochs=3, batch_size=12, learning_rate=0.01),
    "mixed": TrialSettings(epochs=3, batch_size=12, learning_rate=0.01, mixup=0.3, cutmix=0.5, label_smoothing=0.1, schedule="linear"),
    "adam and averages": TrialSettings(epochs=3, batch_size=12, learning_rate=0.01, optimiser="adam", ema_decays=(0.9, 0.5)),
    "best of averages": TrialSettings(epochs=3, batch_size=12, learning_rate=0.05, ema_decays=(0.9,), evaluate_every_steps=2),
    "fp16 with sam": TrialSettings(epochs=3, batch_size=12, learning_rate=0.01, precision="fp16", sam_rho=0.05, optimiser="sgd"),
    "layers": TrialSettings(epochs=3, batch_size=12, learning_rate=0.01, layer_decay=0.8, frozen=("5.bias",)),
    "sgd with sam": TrialSettings(epochs=3, batch_size=12, learning_rate=0.05, optimiser="sgd", sam_rho=0.05),
    "rmsprop": TrialSettings(epochs=3, batch_size=12, learning_rate=0.001, optimiser="rmsprop", loss="binary_cross_entropy"),
    "adafactor in bf16": TrialSettings(epochs=3, batch_size=12, learning_rate=0.01, optimiser="adafactor", precision="bf16"),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_trial_learns_and_repeats_itself(name):
    logged: list[tuple[int, float]] = []
    settings = EVERYTHING[name].model_copy(update={"epochs": 12})

    def log(metrics, step):
        logged.extend((step, value) for key, value in metrics.items() if key == "train/loss")

    made = run(settings, log=log)
    assert [step for step, _ in logged] == [10, 20, 30, 40, 50, 60]
    assert logged[-1][1] < logged[0][1]
    assert equal(made, run(settings))


def killed_and_resumed(settings: TrialSettings, stop: int, path: Path, **where) -> dict[float, Candidate]:
    """What a trial comes to that is killed after that step and begun again from the state it stored."""

    class Killed(Exception):
        pass

    def kill(step, state):
        if step == stop:
            save_weights(path, state())
            raise Killed

    with pytest.raises(Killed):
        run(settings, checkpoint=kill, **where)
    return run(settings, resume=load_weights(path), **where)


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("stop", [1, 4, 5, 11])
def test_a_trial_resumed_from_a_stored_state_ends_bit_identical(name, stop, tmp_path):
    settings = EVERYTHING[name]
    assert equal(killed_and_resumed(settings, stop, tmp_path / "state.safetensors"), run(settings))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["mixed", "adam and averages", "fp16 with sam", "adafactor in bf16"])
def test_a_trial_resumed_on_a_gpu_ends_within_float_tolerance(name, tmp_path):
    settings = EVERYTHING[name]
    resumed, whole = killed_and_resumed(settings, 7, tmp_path / "state.safetensors", device="cuda"), run(settings, device="cuda")
    for decay, candidate in whole.items():
        for tensor, wanted in candidate.weights.items():
            assert torch.allclose(resumed[decay].weights[tensor], wanted, rtol=1e-4, atol=1e-5), (decay, tensor)


def test_micro_batches_give_the_same_gradient():
    settings = TrialSettings(epochs=1, batch_size=12, learning_rate=0.01, mixup=0.3, label_smoothing=0.1)
    torch.manual_seed(0)
    whole, pieces = (nn.Sequential(nn.Flatten(), nn.Linear(192, 3)) for _ in range(2))
    pieces.load_state_dict(whole.state_dict())
    train(whole, settings, batches, steps_per_epoch=STEPS_PER_EPOCH, preprocess=PREPROCESS)
    train(pieces, settings.model_copy(update={"micro_batch": 5}), batches, steps_per_epoch=STEPS_PER_EPOCH, preprocess=PREPROCESS)
    assert all(torch.allclose(tensor, pieces.state_dict()[name], atol=1e-5) for name, tensor in whole.state_dict().items())


def test_frozen_parameters_do_not_move():
    made = run(TrialSettings(epochs=1, batch_size=12, learning_rate=0.05, weight_decay=0.5, frozen=("1.*", "5.bi?s")))
    start = tiny().state_dict()
    moved = {name for name, tensor in made[0.0].weights.items() if not torch.equal(tensor, start[name])}
    assert moved & {"1.weight", "1.bias", "5.bias"} == set()
    assert {"2.weight", "5.weight"} <= moved


def test_fp16_leaves_out_a_step_that_overflows_and_goes_on():
    scales: list[float] = []
    moved: list[Tensor] = []

    def note(_step, state):
        scales.append(state()["scaler.scale"].item())
        moved.append(state()["model.5.weight"].clone())

    settings = TrialSettings(
        epochs=2, batch_size=12, learning_rate=0.01, precision="fp16", loss="tests.stockpot.training.test_trainer:steep"
    )
    run(settings, checkpoint=note)
    assert scales[0] == 2.0**15  # halved after the first step overflowed
    assert torch.equal(moved[0], tiny().state_dict()["5.weight"])
    assert not torch.equal(moved[-1], moved[0])


def steep(logits_BC, targets_BC):
    """A loss whose gradient does not fit into fp16 at the first loss scale, 65536."""
    return nn.functional.cross_entropy(logits_BC.half() * 4, targets_BC.half()).float()


@pytest.mark.slow
def test_a_compiled_trial_ends_near_a_plain_one_under_the_same_names():
    made = []
    for compiled in (False, True):
        model = nn.Sequential(*(layer for layer in tiny() if not isinstance(layer, nn.Dropout)))  # a compiled mask is another one
        settings = TrialSettings(epochs=2, batch_size=12, learning_rate=0.01, optimiser="sgd", ema_decays=(0.9,), compile=compiled)
        made.append(train(model, settings, batches, steps_per_epoch=STEPS_PER_EPOCH, preprocess=PREPROCESS))
    plain, fast = made
    for decay, candidate in plain.items():
        assert fast[decay].weights.keys() == candidate.weights.keys()
        for name, tensor in candidate.weights.items():
            assert torch.allclose(fast[decay].weights[name], tensor, atol=1e-4), name


@pytest.mark.parametrize("asked", [7, 18])
def test_a_trial_given_in_steps_takes_exactly_these_whatever_its_epochs(asked):
    """Of five steps an epoch: two passes for 7, four for 18, though `epochs` says three; the rate falls to the end of them."""
    settings = TrialSettings(epochs=3, max_steps=asked, batch_size=12, learning_rate=0.01, warmup_steps=0)
    steps, passes, rates = [], [], []

    def counted(epoch: int, skip: int = 0) -> Iterator[Batch]:
        passes.append(epoch)
        return batches(epoch, skip)

    def log(metrics, _step):
        rates.append(metrics["train/learning_rate"])

    train(
        tiny(),
        settings,
        counted,
        steps_per_epoch=STEPS_PER_EPOCH,
        preprocess=PREPROCESS,
        checkpoint=lambda step, _state: steps.append(step),
        log=log,
    )
    assert steps == list(range(1, asked + 1))
    assert passes == list(range(-(-asked // STEPS_PER_EPOCH)))
    assert rates[-1] == learning_rate(settings, asked - 1, asked)
    assert total_steps(TrialSettings(max_steps=0), STEPS_PER_EPOCH) == 0
