"""Promise: schedules are functions of the step, only matrices decay, every rule learns, and SAM does what its paper says."""

import copy
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from stockpot.errors import BadRequest
from stockpot.models.classifier import ModelConfig, build
from stockpot.preparation import Preprocess
from stockpot.settings import TrialSettings
from stockpot.training.moving_parts import Training
from stockpot.training.optimisation import (
    climb,
    descend,
    freeze,
    learning_rate,
    optimiser,
    parameter_groups,
    rate_scales,
    require_layers,
    set_learning_rate,
)

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
    freeze(model, ["we*"])
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 1


def test_a_pattern_that_names_nothing_offers_the_nearest_names():
    with pytest.raises(BadRequest, match=r"`frozen: head\.weigth` names no parameter of the model; near are `head\.weight`"):
        freeze(tiny_vit(), ["body.*", "head.weigth"])
    with pytest.raises(BadRequest, match="leaves no parameter to train"):
        freeze(tiny_vit(), ["*"])
    headless = tiny_vit()
    headless.head.requires_grad_(False)
    with pytest.raises(BadRequest, match="leaves no parameter to train"):
        freeze(headless, ["body.*"])


def test_rates_by_layer_equal_an_oracle_on_a_small_vit():
    """Written out by hand: two blocks, so the embeddings are three factors below the top."""
    expected = {
        "body.class_embedding": 0.7**3,
        "body.positional_embedding": 0.7**3,
        "body.conv1.weight": 0.7**3,
        "body.ln_pre.weight": 0.7**3,
        "body.transformer.resblocks.0.attn.in_proj_weight": 0.7**2,
        "body.transformer.resblocks.1.mlp.c_proj.bias": 0.7,
        "body.ln_post.weight": 1.0,
        "body.proj": 1.0,
        "head.weight": 1.0,
        "head.bias": 1.0,
    }
    model = tiny_vit()
    rule = optimiser(model, TrialSettings(layer_decay=0.7))
    set_learning_rate(rule, 0.5)
    rates = {id(parameter): group["lr"] for group in rule.param_groups for parameter in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert {name: found[name] for name in expected} == {name: pytest.approx(0.5 * scale) for name, scale in expected.items()}
    for name, rate in found.items():
        if ".resblocks." in name:
            assert rate == pytest.approx(0.5 * 0.7 ** (2 - int(name.split(".")[3])))


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("body.trunk.patch_embed.proj.weight", 0.5**3),
        ("body.trunk.stem.0.weight", 0.5**3),
        ("body.trunk.blocks.1.2.conv_dw.weight", 0.5),
        ("body.trunk.norm.weight", 1.0),
        ("encoder.layer.0.attention.self.query.weight", 0.25),
    ],
)
def test_other_families_are_counted_from_the_same_top(name, scale):
    model = named(name, "body.trunk.blocks.0.0.x", "body.trunk.blocks.1.0.x")
    assert rate_scales(model, 0.5)[name] == pytest.approx(scale)


def named(*names: str) -> nn.Module:
    """A model with parameters of these names."""
    whole = nn.Module()
    for name in names:
        part = whole
        *path, last = name.split(".")
        for step in path:
            if not hasattr(part, step):
                part.add_module(step, nn.Module())
            part = part.get_submodule(step)
        part.register_parameter(last, nn.Parameter(torch.zeros(1)))
    return whole


def tiny_vit() -> nn.Module:
    """An open_clip tower of two blocks under a head."""
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
    preprocess = Preprocess(size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    return build(ModelConfig(kind="open_clip", arch={"embed_dim": 8, "vision_cfg": vision}, preprocess=preprocess, classes=("a", "b")))


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


def test_a_resnet_is_counted_by_stages():
    preprocess = Preprocess(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    arch = {"embed_dim": 8, "vision_cfg": {"image_size": 32, "layers": [1, 2, 1, 1], "width": 16}}
    scales = rate_scales(build(ModelConfig(kind="open_clip", arch=arch, preprocess=preprocess, classes=("a", "b"))), 0.5)
    oracle = {"conv": 0, "bn": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4, "attnpool": 5, "head": 5}
    for name, scale in scales.items():
        part = name.removeprefix("body.").partition(".")[0]
        assert scale == 0.5 ** (5 - oracle[part if part in oracle else part.rstrip("123")]), name
    assert {scales[name] for name in scales if ".layer3." in name} == {0.25}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "densenet121", "regnety_002", "xcit_nano_12_p8_224", "nf_resnet50"])
def test_a_timm_tower_has_timms_own_layers(name: str) -> None:
    preprocess = Preprocess(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    with torch.device("meta"):
        model = build(ModelConfig(kind="timm", arch={"name": name}, preprocess=preprocess, classes=("a", "b")))
    groups = param_groups_layer_decay(model.body, layer_decay=0.5)
    theirs = {id(parameter): group["lr_scale"] * 0.5 for group in groups for parameter in group["params"]}  # they have no head above them
    scales = rate_scales(model, 0.5)
    assert {name: scales[f"body.{name}"] for name, _ in model.body.named_parameters()} == {
        name: theirs[id(parameter)] for name, parameter in model.body.named_parameters()
    }
    assert scales["head.weight"] == 1
    require_layers(model)


def test_a_model_that_tells_no_block_from_another_has_no_layers() -> None:
    with pytest.raises(BadRequest, match="needs a model whose blocks are numbered"):
        require_layers(named("body.stem.weight", "body.first.weight", "body.second.weight", "head.weight"))


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


@pytest.mark.parametrize("rule", RULES)
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
