"""Guards: every recipe beside greedy equals its formula written out in float64 on tensors, and chooses what its description says."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stockpot.checkpoints import save_weights
from stockpot.outcomes import Accuracy
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.ensemble import ensemble, greedy_ensemble
from stockpot.soup.recipes.geometry import angles, gram
from stockpot.soup.recipes.interpolation import coefficients
from stockpot.soup.recipes.model_stock import model_stock, ratio
from stockpot.soup.recipes.pruned import pruned
from stockpot.soup.recipes.weights import Weights, open_weights

State = dict[str, Tensor]


@pytest.fixture
def pool(tmp_path: Path) -> tuple[list[State], list[Weights]]:
    """An init and three ingredients."""
    rng = torch.Generator().manual_seed(0)
    init = {"a": torch.randn(4, 3, generator=rng), "b": torch.randn(5, generator=rng), "scale": torch.tensor(2.0)}
    states = [init] + [
        {name: tensor + 0.1 * (1 + torch.randn(tensor.shape, generator=rng)) for name, tensor in init.items()} for _ in range(3)
    ]
    for number, state in enumerate(states):
        save_weights(tmp_path / f"{number}.safetensors", state)
    return states, [open_weights(tmp_path / f"{number}.safetensors") for number in range(4)]


def mean(states: Sequence[State]) -> State:
    return {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_interpolation_is_on_the_line_from_init_to_soup(pool: tuple[list[State], list[Weights]], alpha: float) -> None:
    states, files = pool
    found, soup = average(files, coefficients(3, alpha)), mean(states[1:])
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (states[0][name].double() * (1 - alpha) + soup[name] * alpha).float(), rtol=1e-6, atol=1e-7)


def test_model_stock_is_the_formula_tensor_by_tensor(pool: tuple[list[State], list[Weights]]) -> None:
    states, files = pool
    found, soup = model_stock(files[0], files[1:]), mean(states[1:])
    for name in ("a", "b"):
        steps = [(state[name].double() - states[0][name].double()).flatten() for state in states[1:]]
        cosines = [float(steps[i] @ steps[j] / steps[i].norm() / steps[j].norm()) for i, j in ((0, 1), (0, 2), (1, 2))]
        share = ratio(sum(cosines) / 3, 3)
        wanted = states[0][name].double() * (1 - share) + soup[name].float().double() * share
        torch.testing.assert_close(found[name], wanted.float(), rtol=1e-6, atol=1e-7)
    assert torch.equal(found["scale"], soup["scale"].float())


def test_model_stock_of_one_is_that_model_and_of_agreeing_ones_their_mean(pool: tuple[list[State], list[Weights]]) -> None:
    states, files = pool
    assert torch.equal(model_stock(files[0], files[1:2])["a"], states[1]["a"])
    assert (ratio(1.0, 4), ratio(0.0, 4), ratio(-0.2, 4)) == (1.0, 0.0, 0.0)


def test_angles_are_those_between_the_differences(pool: tuple[list[State], list[Weights]]) -> None:
    states, files = pool
    steps = [torch.cat([(state[name].double() - states[0][name].double()).flatten() for name in state]) for state in states[1:]]
    found = angles(gram(files[0], files[1:]))
    assert [found[i][i] for i in range(3)] == [0.0] * 3
    cosine = float(steps[0] @ steps[2] / steps[0].norm() / steps[2].norm())
    assert abs(found[0][2] - float(torch.rad2deg(torch.acos(torch.tensor(cosine, dtype=torch.float64))))) < 1e-6
    counting = []
    for number, state in enumerate(states):
        place = files[0].path.with_name(f"counting-{number}.safetensors")
        save_weights(place, state | {"steps": torch.tensor(1000 * number)})
        counting.append(open_weights(place))
    assert torch.equal(gram(counting[0], counting[1:]), gram(files[0], files[1:])), "how many steps were counted is no direction"
    assert angles(torch.zeros(2, 2, dtype=torch.float64)) == [[0.0, 90.0], [90.0, 0.0]]


def test_pruning_drops_from_the_worst_while_it_is_not_worse() -> None:
    table = {"abcd": 6, "abc": 7, "ab": 6, "ac": 7, "a": 8, "bc": 5, "c": 1}

    def score(trials: Sequence[str]) -> Accuracy:
        return Accuracy(correct=table.get("".join(sorted(trials)), 0), seen=10)

    held_out = {trial: Accuracy(correct=correct, seen=10) for trial, correct in zip("abcd", (6, 5, 4, 3), strict=True)}
    assert pruned(held_out, score) == ("a", "c")
    table["ac"] = 6
    assert pruned(held_out, score) == ("a", "b", "c")


def test_the_ensemble_averages_logits_and_greedy_chooses_its_members() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    logits = {
        "a": torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [1.0, 0.0]]),
        "b": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 3.0]]),
        "c": torch.tensor([[0.0, 9.0], [0.0, 9.0], [9.0, 0.0], [9.0, 0.0]]),
    }
    assert torch.equal(ensemble(logits, ["a", "b"]), (logits["a"] + logits["b"]) / 2)
    assert greedy_ensemble(logits, labels) == ("a", "b")
