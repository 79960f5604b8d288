"""Guards: a mean is the naive float64 mean, in any order, layout and number of threads, and strangers are refused by name."""

import copy
import os
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stockpot.checkpoints import load_weights, save_weights
from stockpot.errors import IngredientMismatch
from stockpot.soup.recipes import averaging, weights
from stockpot.soup.recipes.averaging import CHUNK, average, first_non_finite
from stockpot.soup.recipes.weights import Weights, open_weights

State = dict[str, Tensor]


def naive_mean(states: Sequence[State]) -> State:
    """The oracle: one tensor at a time, float64, rounded once."""
    return {name: torch.stack([state[name].double() for state in states]).mean(0).to(first.dtype) for name, first in states[0].items()}


def stored(folder: Path, states: Sequence[State]) -> list[Weights]:
    folder.mkdir(exist_ok=True)
    for number, state in enumerate(states):
        save_weights(folder / f"{number}.safetensors", state)
    return [open_weights(folder / f"{number}.safetensors") for number in range(len(states))]


def random_states(seed: int, files: int, dtype: torch.dtype = torch.float32, elements: int = 7) -> list[State]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"body.weight": (elements, 3), "body.bias": (elements,), "head.weight": (2, 5), "scale": ()}
    return [{name: torch.randn(shape, generator=rng).mul(3).to(dtype) for name, shape in shapes.items()} for _ in range(files)]


def close(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], rtol=0, atol=3e-6) for name in one)


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    files=st.integers(1, 6),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64]),
)
def test_the_mean_is_the_float64_mean_rounded_once(
    tmp_path_factory: pytest.TempPathFactory, seed: int, files: int, dtype: torch.dtype
) -> None:
    states = random_states(seed, files, dtype)
    found = average(stored(tmp_path_factory.mktemp("mean"), states))
    wanted = naive_mean(states)
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=0 if dtype != torch.float64 else 1e-15, atol=0 if dtype != torch.float64 else 1e-15
        )


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), files=st.integers(1, 24), power=st.integers(0, 30))
def test_the_float32_mean_is_within_one_rounding_a_file_of_the_exact_one(
    tmp_path_factory: pytest.TempPathFactory, seed: int, files: int, power: int
) -> None:
    states = random_states(seed, files)
    for number, state in enumerate(states):  # magnitudes that make a sum lose bits
        state["body.weight"] *= 2.0 ** (number % 3 * power - power)
    found = average(stored(tmp_path_factory.mktemp("bound"), states))
    for name, mean in found.items():
        stack = torch.stack([state[name].double() for state in states])
        bound = files * 2.0**-24 * stack.abs().mean(0) * (1 + 1e-5)
        assert bool(((mean.double() - stack.mean(0)).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_chunks_and_stretches_and_any_number_of_threads_give_the_same_bits(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = random_states(1, 3, dtype, elements=CHUNK // 4)
    files = stored(tmp_path, states)
    lone = average(files, threads=1)
    assert same(average(files, threads=3), lone)
    monkeypatch.setattr(averaging, "MAPPED", 1)
    assert same(average(files, threads=3), lone)
    assert (close if dtype == torch.float32 else same)(lone, naive_mean(states))


def test_a_file_that_shrinks_while_it_is_averaged_is_a_sentence(tmp_path: Path) -> None:
    files = stored(tmp_path, random_states(1, 2, elements=CHUNK // 4))
    os.truncate(files[1].path, CHUNK)
    with pytest.raises(IngredientMismatch, match="ended while it was read"):
        average(files)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(5)))
def test_the_order_of_the_files_does_not_matter(tmp_path_factory: pytest.TempPathFactory, seed: int, order: list[int]) -> None:
    files = stored(tmp_path_factory.mktemp("order"), random_states(seed, 5))
    assert same(average(files), average([files[place] for place in order]))


def test_files_that_differ_in_one_number_only_keep_their_order(tmp_path: Path) -> None:
    state = {"w": torch.full((20_000,), 0.1), "x": torch.tensor(1.0)}
    files = stored(tmp_path, [{**state, "x": torch.tensor(number)} for number in (1e8, 3.0, -1e8, 2.0)])
    for turned in permutations(files):
        assert same(average(files), average(turned))


def test_a_file_alone_and_one_whose_digest_is_known_are_not_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = stored(tmp_path, random_states(8, 2))
    known = [open_weights(file.path, file.sha256) for file in files]
    wanted = average(files)
    hashed: list[Path] = []
    monkeypatch.setattr(weights, "file_digest", lambda path: hashed.append(path) or "0")
    assert same(average(known), wanted)
    average([open_weights(files[0].path)] * 2)
    assert hashed == []


def test_files_laid_out_differently_are_matched_by_name(tmp_path: Path) -> None:
    first, second = random_states(2, 2)
    half = {"extra": torch.ones(3, dtype=torch.float16)}
    from safetensors.torch import save_file

    save_file(first | half, tmp_path / "a.safetensors")
    names = list(reversed(second))
    data = {name: second[name] for name in names}
    save_file(data | half, tmp_path / "b.safetensors")
    found = average([open_weights(tmp_path / "a.safetensors"), open_weights(tmp_path / "b.safetensors")])
    assert close(found, naive_mean([first | half, second | half]))


def test_coefficients_weigh_the_files(tmp_path: Path) -> None:
    states = random_states(3, 2)
    found = average(stored(tmp_path, states), [1.5, -0.5])
    wanted = {name: (states[0][name].double() * 1.5 - states[1][name].double() * 0.5).float() for name in states[0]}
    assert same(found, wanted)


def test_sums_that_overflow_float16_do_not(tmp_path: Path) -> None:
    states = [{"w": torch.full((3,), 40_000.0, dtype=torch.float16)} for _ in range(4)]
    assert same(average(stored(tmp_path, states)), states[0])


def test_integer_tensors_are_copied_when_equal_and_refused_when_not(tmp_path: Path) -> None:
    one: State = {"index": torch.arange(4), "mask": torch.tensor([True, False]), "bn.num_batches_tracked": torch.tensor(3)}
    other = {**copy.deepcopy(one), "bn.num_batches_tracked": torch.tensor(7)}
    found = average(stored(tmp_path / "same", [one, other]))
    assert found["bn.num_batches_tracked"] == 7
    assert torch.equal(found["mask"], one["mask"])
    with pytest.raises(IngredientMismatch, match="`index` is an integer tensor"):
        average(stored(tmp_path / "differ", [one, {**other, "index": torch.zeros(4, dtype=torch.int64)}]))


def test_tied_tensors_are_averaged_once_and_tied_again(tmp_path: Path) -> None:
    states = [{"a": tensor, "b": tensor} for tensor in (torch.ones(3), torch.zeros(3))]
    found = average(stored(tmp_path, states))
    assert found["b"].data_ptr() == found["a"].data_ptr()
    assert torch.equal(found["a"], torch.full((3,), 0.5))


def test_files_that_tie_other_tensors_are_strangers(tmp_path: Path) -> None:
    one, other = torch.arange(3.0), torch.ones(3)
    files = stored(tmp_path, [{"a": one, "c": other, "tail": tied} for tied in (one, other)])
    with pytest.raises(IngredientMismatch, match=r"it ties {'tail': 'c'}, the other {'tail': 'a'}"):
        average(files)


def test_a_soup_of_one_is_that_model_to_the_byte(tmp_path: Path) -> None:
    (state,) = random_states(4, 1)
    sha256 = save_weights(tmp_path / "one.safetensors", state)
    assert save_weights(tmp_path / "soup.safetensors", average([open_weights(tmp_path / "one.safetensors")])) == sha256
    assert same(load_weights(tmp_path / "soup.safetensors"), state)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"head.weight": torch.zeros(2, 6)}, r"`head\.weight` is float32 \[2, 6\] in it and float32 \[2, 5\]"),
        ({"scale": torch.zeros((), dtype=torch.float64)}, "`scale` is float64"),
        ({"new": torch.zeros(1)}, "`new` is float32"),
    ],
)
def test_strangers_are_refused_by_name(tmp_path: Path, change: State, told: str) -> None:
    one, other = random_states(5, 2)
    with pytest.raises(IngredientMismatch, match=told):
        average(stored(tmp_path, [one, other | change]))


def test_a_nan_is_found_by_name(tmp_path: Path) -> None:
    (state,) = random_states(7, 1)
    state["body.bias"][3] = float("nan")
    assert first_non_finite(stored(tmp_path, [state])[0]) == "body.bias"
