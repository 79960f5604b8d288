"""Promise: a trial learns; a state taken after any step, stored and loaded, leads to bit-identical weights; numbers that stop being
numbers stop the trial by step; micro-batches change memory, not results."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stockpot.checkpoints import load_weights, save_weights
from stockpot.config import Preprocess, TrialSettings
from stockpot.errors import NonFinite, TrialFailed
from stockpot.training.trainer import total_steps, train

PREPROCESS = Preprocess(size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
STEPS_PER_EPOCH = 5
EVERYTHING = {
    "plain": TrialSettings(epochs=3, batch_size=12, learning_rate=0.01),
    "mixed": TrialSettings(epochs=3, batch_size=12, learning_rate=0.01, mixup=0.3, cutmix=0.5, label_smoothing=0.1, schedule="linear"),
    "adam and average": TrialSettings(epochs=3, batch_size=12, learning_rate=0.01, optimiser="adam", ema_decay=0.9),
    "sgd with sam": TrialSettings(epochs=3, batch_size=12, learning_rate=0.05, optimiser="sgd", sam_rho=0.05),
    "rmsprop": TrialSettings(epochs=3, batch_size=12, learning_rate=0.001, optimiser="rmsprop", loss="binary_cross_entropy"),
    "adafactor in bf16": TrialSettings(epochs=3, batch_size=12, learning_rate=0.01, optimiser="adafactor", precision="bf16"),
}


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor


def tiny() -> nn.Module:
    """BatchNorm and dropout on purpose: buffers and random masks must come back too."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def batches(epoch: int, skip: int = 0) -> Iterator[Batch]:
    for step in range(skip, STEPS_PER_EPOCH):
        rng = np.random.default_rng([epoch, step])
        labels = rng.integers(0, 3, 12)
        images = rng.integers(0, 150, (12, 3, 8, 8))
        images[np.arange(12), labels] += 60
        yield Batch(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels))


def run(settings: TrialSettings, **kwargs) -> nn.Module:
    model = tiny()
    train(model, settings, batches, steps_per_epoch=STEPS_PER_EPOCH, preprocess=PREPROCESS, **kwargs)
    return model


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_trial_learns_and_repeats_itself(name):
    logged: list[tuple[int, float]] = []
    settings = EVERYTHING[name].model_copy(update={"epochs": 12})
    model = run(settings, log=lambda metrics, step: logged.append((step, metrics["train/loss"])))
    assert [step for step, _ in logged] == [10, 20, 30, 40, 50, 60]
    assert logged[-1][1] < logged[0][1]
    assert equal(model, run(settings))


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("stop", [1, 4, 5, 11])
def test_a_trial_resumed_from_a_stored_state_ends_bit_identical(name, stop, tmp_path):
    settings = EVERYTHING[name]

    class Killed(Exception):
        pass

    def kill(step, state):
        if step == stop:
            save_weights(tmp_path / "state.safetensors", state())
            raise Killed

    with pytest.raises(Killed):
        run(settings, checkpoint=kill)
    resumed = run(settings, resume=load_weights(tmp_path / "state.safetensors"))
    assert equal(resumed, run(settings))


def test_micro_batches_give_the_same_gradient():
    settings = TrialSettings(epochs=1, batch_size=12, learning_rate=0.01, mixup=0.3, label_smoothing=0.1)
    torch.manual_seed(0)
    whole, pieces = (nn.Sequential(nn.Flatten(), nn.Linear(192, 3)) for _ in range(2))
    pieces.load_state_dict(whole.state_dict())
    train(whole, settings, batches, steps_per_epoch=STEPS_PER_EPOCH, preprocess=PREPROCESS)
    train(pieces, settings.model_copy(update={"micro_batch": 5}), batches, steps_per_epoch=STEPS_PER_EPOCH, preprocess=PREPROCESS)
    assert all(torch.allclose(tensor, pieces.state_dict()[name], atol=1e-5) for name, tensor in whole.state_dict().items())


def test_the_moving_average_is_the_formula():
    seen: list[Tensor] = []

    def note(_step, state):
        seen.append(state()["model.1.weight"].clone())

    model = run(TrialSettings(epochs=2, batch_size=12, learning_rate=0.01, ema_decay=0.8), checkpoint=note)
    average = tiny().state_dict()["1.weight"]
    for weight in seen:
        average = 0.8 * average + 0.2 * weight
    assert torch.allclose(model.state_dict()["1.weight"], average, atol=1e-5)


def test_max_steps_end_a_trial_before_its_epochs():
    settings = TrialSettings(epochs=3, max_steps=7)
    steps: list[int] = []
    run(settings, checkpoint=lambda step, _state: steps.append(step))
    assert steps == list(range(1, 8))
    assert total_steps(settings, STEPS_PER_EPOCH) == 7
    assert total_steps(TrialSettings(epochs=3, max_steps=99), STEPS_PER_EPOCH) == 15


def test_a_loss_that_is_no_number_names_its_step():
    model = tiny()

    def poison(step, _state):
        if step == 6:
            with torch.no_grad():
                model[5].bias.fill_(float("nan"))

    with pytest.raises(NonFinite, match="at step 7"):
        train(
            model,
            TrialSettings(epochs=3, clip_norm=0),
            batches,
            steps_per_epoch=STEPS_PER_EPOCH,
            preprocess=PREPROCESS,
            checkpoint=poison,
        )


def test_running_out_of_memory_says_what_would_fit():
    class Hungry(nn.Linear):
        def forward(self, images):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrialFailed, match=r"at step 1 with 12 images a forward pass\. Set `micro_batch` to 6"):
        train(Hungry(3, 3), TrialSettings(epochs=1), batches, steps_per_epoch=STEPS_PER_EPOCH, preprocess=PREPROCESS)
