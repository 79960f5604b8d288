"""Promise: numbers that stop being numbers, memory that runs out and a model that does not compile stop a trial with a sentence."""

import pytest
import torch
from torch import nn

from stockpot.errors import NonFinite, TrialFailed
from stockpot.settings import TrialSettings
from stockpot.training import optimisation
from stockpot.training.candidates import MovingAverages
from stockpot.training.trainer import train
from tests.tiny_training import PREPROCESS, STEPS_PER_EPOCH, batches, run, tiny


def test_a_model_that_does_not_compile_says_so():
    class Talking(nn.Linear):
        def forward(self, images):
            torch._dynamo.graph_break()
            return super().forward(images.flatten(1))

    with pytest.raises(TrialFailed, match=r"The model does not compile .*Set `compile: false`"):
        train(
            Talking(192, 3),
            TrialSettings(epochs=1, compile=True),
            batches,
            steps_per_epoch=STEPS_PER_EPOCH,
            preprocess=PREPROCESS,
        )


def test_a_state_that_is_no_number_is_never_stored():
    def poison(step, state):
        if step == 3:
            raise AssertionError(state())

    class Infinite(nn.Linear):
        def forward(self, images):
            with torch.no_grad():
                self.bias.fill_(float("inf"))
            return super().forward(images.flatten(1)) * 0

    with pytest.raises(NonFinite, match="Weights stopped being numbers by step 3: `weight`"):
        train(
            Infinite(192, 3),
            TrialSettings(epochs=1, clip_norm=0),
            batches,
            steps_per_epoch=STEPS_PER_EPOCH,
            preprocess=PREPROCESS,
            checkpoint=poison,
        )


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


@pytest.mark.parametrize(("room", "said"), [(5, r"Measured: 3 fit\. Set `micro_batch` to 3:"), (0, "Not even one image fits")])
def test_running_out_of_memory_says_what_was_measured_to_fit(room, said):
    class Hungry(nn.Linear):
        def forward(self, images):
            if len(images) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(images.flatten(1))

    with pytest.raises(TrialFailed, match=rf"at step 1 with 12 images a forward pass \(batch of 12\)\. {said}"):
        train(Hungry(192, 3), TrialSettings(epochs=1), batches, steps_per_epoch=STEPS_PER_EPOCH, preprocess=PREPROCESS)


@pytest.mark.parametrize(
    ("owner", "place", "settings", "said"),
    [
        (nn.Module, "to", {}, r"for the model, 1\.3e-05 GB of weights\. Use a device with more memory, or a smaller model"),
        (torch.optim.AdamW, "step", {}, r"for the step of adamw beside 1\.3e-05 GB of gradients\. `adafactor` keeps hardly any"),
        (optimisation, "climb", {"sam_rho": 0.1}, r"for sharpness-aware minimisation, a copy of 1\.3e-05 GB of weights\. Set `sam_rho: 0`"),
        (MovingAverages, "__init__", {"ema_decays": (0.9, 0.99)}, r"for moving averages, 5\.1e-05 GB in float64\. Leave a decay out"),
        (MovingAverages, "update", {"ema_decays": (0.9,)}, r"for moving averages, 2\.5e-05 GB in float64\. Leave a decay out"),
        (
            nn.Module,
            "eval",
            {"evaluate_every_steps": 2},
            r"for an evaluation beside what training holds\. Leave `evaluate_every_steps` out",
        ),
    ],
)
def test_running_out_of_memory_elsewhere_says_for_what_and_what_to_do(monkeypatch, owner, place, settings, said):
    def full(*_arguments, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(owner, place, full)
    with pytest.raises(TrialFailed, match=f"The device ran out of memory {said}"):
        run(TrialSettings(epochs=1, batch_size=12, **settings))
