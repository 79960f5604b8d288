"""Promise: schedules are functions of the step, only matrices decay, and every rule is the one named, and learns."""

from itertools import pairwise

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from stockpot.errors import BadRequest
from stockpot.models.classifier import ModelConfig, build
from stockpot.preparation import Preprocess
from stockpot.settings import TrialSettings
from stockpot.training.optimisation import (
    freeze,
    learning_rate,
    optimiser,
    parameter_groups,
    rate_scales,
    require_layers,
    set_learning_rate,
)

RULES = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adafactor": torch.optim.Adafactor,
}


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
def test_a_rule_is_torchs_of_that_name(rule):
    """AdamW is an Adam to torch, so the very class counts."""
    made = optimiser(nn.Linear(8, 1), TrialSettings(optimiser=rule, weight_decay=0.3, learning_rate=0.02))
    assert type(made) is RULES[rule]
    assert [group["weight_decay"] for group in made.param_groups] == [0.3, 0.0]
    assert {group["lr"] for group in made.param_groups} == {0.02}
    assert {group.get("momentum") for group in made.param_groups} == {0.9 if rule in ("sgd", "rmsprop") else None}


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
