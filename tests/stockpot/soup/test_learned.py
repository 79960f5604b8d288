"""Guards: the streamed gradient of the mixing weights is autograd's through the mixture, learning finds the good ingredients, and its
memory is a few models however many ingredients there are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from stockpot.checkpoints import save_weights
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.learned import layer_of, learn, mixture, pulls, put
from stockpot.soup.recipes.weights import Weights, open_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()


@pytest.fixture
def pool(tmp_path: Path) -> list[Weights]:
    torch.manual_seed(0)
    for number in range(4):
        model = network()
        model[1].running_mean.uniform_()
        save_weights(tmp_path / f"{number}.safetensors", model.state_dict())
    return [open_weights(tmp_path / f"{number}.safetensors") for number in range(4)]


def states(pool: list[Weights]) -> list[dict[str, Tensor]]:
    return [average([file]) for file in pool]


def data() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(64, 4, generator=rng), torch.randint(3, (64,), generator=rng)


@pytest.mark.parametrize("by_layer", [False, True])
def test_the_streamed_gradient_is_autograd_through_the_mixture(pool: list[Weights], by_layer: bool) -> None:
    layers = sorted({layer_of(name) for name in pool[0].slots}) if by_layer else [""]
    shares = torch.rand(len(layers), 4, dtype=torch.float64).softmax(1).requires_grad_()
    x, y = data()
    model = network()
    put(model, pool, dict(zip(layers, shares.tolist(), strict=True)))
    functional.cross_entropy(model(x), y).backward()
    found = pulls(model, pool, layers)
    every = states(pool)
    live = {
        name: sum(shares[layers.index(layer_of(name)) if by_layer else 0, i] * every[i][name].double() for i in range(4)).float()
        for name in every[0]
        if every[0][name].is_floating_point()
    }
    live = {name: tensor.detach() if "running" in name else tensor for name, tensor in live.items()}
    functional.cross_entropy(functional_call(network(), live, x), y).backward()
    assert shares.grad is not None
    torch.testing.assert_close(found, shares.grad, rtol=1e-5, atol=1e-7)


def test_equal_shares_are_the_plain_mean(pool: list[Weights]) -> None:
    mean, found = average(pool), mixture(pool, {"": [0.25] * 4})
    assert found.keys() == mean.keys()
    assert all(torch.allclose(found[name], mean[name], rtol=0, atol=1e-6) for name in mean)


def test_learning_turns_to_the_ingredient_that_made_the_labels(tmp_path: Path) -> None:
    x, _ = data()
    torch.manual_seed(3)
    for number in range(4):
        save_weights(tmp_path / f"{number}.safetensors", nn.Sequential(nn.Linear(4, 3)).state_dict())
    files = [open_weights(tmp_path / f"{number}.safetensors") for number in range(4)]
    model = nn.Sequential(nn.Linear(4, 3))
    model.load_state_dict(average([files[2]]))
    labels = model(x).argmax(1)
    found = learn(model, files, [(x, labels)] * 60, by_layer=False, learning_rate=0.1)[""]
    assert max(found) == found[2] > 0.6
    assert abs(sum(found) - 1) < 1e-9


def test_by_layer_every_layer_has_its_own_shares(pool: list[Weights]) -> None:
    found = learn(network(), pool, [data()] * 3, by_layer=True, learning_rate=0.1)
    assert set(found) == {"0", "1", "3"}
    assert len(set(found.values())) == 3


def test_layers_are_blocks_or_modules() -> None:
    assert [layer_of(name) for name in ("body.transformer.resblocks.3.ln_1.weight", "head.weight", "body.conv1.weight")] == [
        "body.transformer.resblocks.3",
        "head",
        "body.conv1",
    ]


@pytest.mark.slow
def test_sixteen_ingredients_are_mixed_by_layer_in_three_models_of_memory() -> None:
    run = subprocess.run([sys.executable, "-m", "benchmarks.soup_learned", "--memory", "16"], check=True, capture_output=True, text=True)
    assert json.loads(run.stdout)["models"] <= 3
