"""Promise: averages are their formula, the best of each is kept, and neither an average nor an evaluation changes the training."""

import pytest
import torch
from torch import Tensor, nn

from stockpot.outcomes import Accuracy
from stockpot.settings import TrialSettings
from stockpot.training.candidates import MovingAverages, wearing
from stockpot.training.trainer import State
from tests.tiny_training import run, tiny


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
