"""Promise: SAM does what its paper says (Foret et al. 2021, arXiv:2010.01412), around every rule."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn

from stockpot.preparation import Preprocess
from stockpot.settings import TrialSettings
from stockpot.training.moving_parts import Training
from stockpot.training.optimisation import climb, descend, optimiser


def test_nobody_climbs_along_a_gradient_that_overflowed():
    model = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter, value in zip(model.parameters(), (float("inf"), float("nan")), strict=True):
        parameter.grad = torch.full_like(parameter, value)
    climb(model, 0.05)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


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


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd", "rmsprop", "adafactor"])
def test_sharpness_aware_steps_of_every_rule_equal_an_oracle(rule):
    """Written out: the gradient of w + rho g / |g| over all weights, applied by the rule at w. Three steps, so that moments count."""
    settings = TrialSettings(optimiser=rule, sam_rho=0.1, learning_rate=0.01, clip_norm=0, batch_size=6)
    preprocess = Preprocess(size=4, mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    naive = copy.deepcopy(model)
    training, stepper = Training(model, settings, preprocess), optimiser(naive, settings)
    for step in range(3):
        rng = torch.Generator().manual_seed(step)
        batch = Given(torch.randint(0, 256, (6, 3, 4, 4), generator=rng, dtype=torch.uint8), torch.randint(0, 3, (6,), generator=rng))
        training.advance(batch, 0.01)

        weights = [parameter.detach().clone() for parameter in naive.parameters()]
        gradients = torch.autograd.grad(naive_loss(naive, batch), list(naive.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(naive.parameters(), gradients, strict=True):
                parameter.add_(0.1 * gradient / norm)
        sharp = torch.autograd.grad(naive_loss(naive, batch), list(naive.parameters()))
        with torch.no_grad():
            for parameter, weight, gradient in zip(naive.parameters(), weights, sharp, strict=True):
                parameter.copy_(weight)
                parameter.grad = gradient
        stepper.step()
    for parameter, wanted in zip(model.parameters(), naive.parameters(), strict=True):
        assert torch.allclose(parameter, wanted, atol=2e-6)


class Given(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor


def naive_loss(model, batch):
    return nn.functional.cross_entropy(model((batch.images / 255 - 0.5) / 0.25), batch.labels)
