"""Promise: schedules are functions of the step, only matrices decay, every rule learns, and SAM does what its paper says."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from stockpot.config import TrialSettings
from stockpot.training.optimisation import climb, descend, learning_rate, optimiser, parameter_groups

RULES = ("adamw", "adam", "sgd", "rmsprop", "adafactor")


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 1 / 90), ("cosine", 0.0003)])
def test_rates_rise_then_follow_the_schedule(schedule, last):
    settings = TrialSettings(learning_rate=0.5, schedule=schedule, warmup_steps=500)
    rates = [learning_rate(settings, step, 100) / 0.5 for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])  # a tenth of all steps, not 500
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(last, abs=1e-4)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rates[10:]))


def test_half_way_down_the_cosine_is_half():
    assert learning_rate(TrialSettings(learning_rate=0.2, warmup_steps=0), 50, 100) == pytest.approx(0.1)


def test_biases_and_norms_are_not_decayed():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    decayed, free = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], len(decayed["params"])) == (0.3, 1)
    assert (free["weight_decay"], len(free["params"])) == (0.0, 3)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 1


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_lowers_a_loss(rule):
    torch.manual_seed(0)
    model, data = nn.Linear(8, 1), torch.randn(64, 8)
    goal = data @ torch.randn(8, 1)
    stepper = optimiser(model, TrialSettings(optimiser=rule, learning_rate=0.02, weight_decay=0.0))
    losses = []
    for _ in range(60):
        stepper.zero_grad()
        loss = (model(data) - goal).square().mean()
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]  # adafactor's steps are relative to the weights, which are small here


def test_climbing_moves_by_rho_along_the_gradient_and_back_to_the_bit():
    model = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.randn(5, 3)).square().mean().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    undo = climb(model, 0.05)
    moved = torch.cat([(parameter - before[name]).flatten() for name, parameter in model.named_parameters()])
    assert torch.allclose(moved, 0.05 * gradient / gradient.norm(), atol=1e-6)
    descend(undo)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
