"""Promise: a trial learns; a state taken after any step, stored and loaded, leads to bit-identical weights; numbers that stop being
numbers stop the trial by step; micro-batches change memory, not results."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stockpot.checkpoints import load_weights, save_weights
from stockpot.errors import NonFinite, TrialFailed
from stockpot.evaluation import normalise
from stockpot.outcomes import Accuracy
from stockpot.preparation import Preprocess
from stockpot.settings import TrialSettings
from stockpot.training import optimisation
from stockpot.training.candidates import Candidate, MovingAverages, wearing
from stockpot.training.optimisation import learning_rate
from stockpot.training.trainer import State, total_steps, train

PREPROCESS = Preprocess(size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
STEPS_PER_EPOCH = 5
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


def score(model: nn.Module) -> Accuracy:
    """Right answers among ten batches that no step trains on."""
    model.eval()
    pairs = [(normalise(one.images, PREPROCESS), one.labels) for epoch in (98, 99) for one in batches(epoch)]
    with torch.inference_mode():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in pairs)
    model.train()
    return Accuracy(correct=right, seen=120)


def run(settings: TrialSettings, **kwargs) -> dict[float, Candidate]:
    """The candidates of a trial."""
    return train(tiny(), settings, batches, steps_per_epoch=STEPS_PER_EPOCH, preprocess=PREPROCESS, **{"score": score, **kwargs})


def equal(one: dict[float, Candidate], other: dict[float, Candidate]) -> bool:
    return one.keys() == other.keys() and all(
        one[decay].step == other[decay].step
        and all(torch.equal(tensor, other[decay].weights[name]) for name, tensor in one[decay].weights.items())
        for decay in one
    )


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


def test_moving_averages_are_the_formula():
    seen: list[Tensor] = []

    def note(_step, state):
        seen.append(state()["model.1.weight"].clone())

    made = run(TrialSettings(epochs=2, batch_size=12, learning_rate=0.01, ema_decays=(0.8, 0.99)), checkpoint=note)
    assert torch.equal(made[0.0].weights["1.weight"], seen[-1])
    for decay in (0.8, 0.99):
        average = tiny().state_dict()["1.weight"].double()
        for weight in seen:
            average = decay * average + (1 - decay) * weight.double()
        assert torch.equal(made[decay].weights["1.weight"], average.float())
    assert made[0.8].weights["2.num_batches_tracked"] == 10  # what is no float is not averaged


def test_an_average_takes_in_steps_that_float32_would_lose():
    """Each moves it by 1e-8, where the last digit of float32 is worth 1.2e-7."""
    model, decay = nn.Linear(1, 1, bias=False), 0.99999
    nn.init.ones_(model.weight)
    averages = MovingAverages(model, (decay,))
    nn.init.constant_(model.weight, 1.001)
    for _ in range(3000):
        averages.update()
    oracle = 1.001 - 0.001 * decay**3000
    with wearing(model, averages.averages[decay]):
        assert model.weight.item() == pytest.approx(oracle, abs=1.2e-7)
    assert oracle - 1 > 2.9e-5


def test_the_best_of_every_average_is_kept_and_the_earlier_of_equals():
    own, average = iter([50, 70, 70, 60, 10]), iter([10, 20, 30, 80, 80])
    asked: list[int] = []
    seen: dict[int, State] = {}

    def scripted(_model):
        asked.append(max(seen, default=0) + 1)
        return Accuracy(correct=next(own if asked.count(asked[-1]) == 1 else average), seen=100)

    def note(step, state):
        seen[step] = {name: tensor.clone() for name, tensor in state().items()}

    settings = TrialSettings(epochs=3, max_steps=9, batch_size=12, learning_rate=0.01, evaluate_every_steps=2, ema_decays=(0.9,))
    made = run(settings, score=scripted, checkpoint=note)
    assert asked == [2, 2, 4, 4, 6, 6, 8, 8, 9, 9]  # and once more at the end
    assert (made[0.0].step, made[0.9].step) == (4, 8)
    assert torch.equal(made[0.0].weights["1.weight"], seen[4]["model.1.weight"])
    assert torch.equal(made[0.9].weights["1.weight"], seen[8]["ema.0.9.1.weight"].float())


def test_evaluation_changes_no_step():
    settings = TrialSettings(epochs=3, batch_size=12, learning_rate=0.02, ema_decays=(0.9,))
    last: list[Tensor] = []
    for one in (settings, settings.model_copy(update={"evaluate_every_steps": 4})):
        run(one, checkpoint=lambda step, state: last.append(state()["model.1.weight"].clone()) if step == 15 else None)
    assert torch.equal(*last)


def test_tied_weights_are_averaged_once_and_get_their_own_storage_back():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    averages = MovingAverages(model, (0.5,))
    assert list(averages.averages[0.5]) == ["a.weight", "a.bias", "b.bias"]
    with torch.no_grad():
        model["a"].weight.fill_(8.0)
    before = model["a"].weight.data_ptr()
    averages.update()
    with wearing(model, averages.averages[0.5]):
        assert model["b"].weight is model["a"].weight
        assert not (model["a"].weight == 8.0).any()
        assert model["a"].weight.data_ptr() != before
    assert (model["a"].weight == 8.0).all()
    assert model["a"].weight.data_ptr() == before


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
