"""Guards: a soup equals the naive float64 mean of its members, and greedy decides as the reference loop does, for random pools and ties."""

import copy
import json
import os
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stockpot.checkpoints import load_weights, save_weights
from stockpot.errors import IngredientMismatch
from stockpot.evaluation import right
from stockpot.outcomes import Accuracy
from stockpot.soup.recipes import averaging, weights
from stockpot.soup.recipes.averaging import CHUNK, average, first_non_finite
from stockpot.soup.recipes.examining import Verdict, doubtful_first, examine, floor, margins
from stockpot.soup.recipes.greedy import Score, greedy, members, ranked, shuffled
from stockpot.soup.recipes.preranking import by_averaged_logits
from stockpot.soup.recipes.speculation import Speculation
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


@settings(deadline=None, max_examples=25)
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


@settings(deadline=None, max_examples=25)
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


@settings(deadline=None, max_examples=15)
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


def test_a_truncated_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    save_weights(path, random_states(6, 1)[0])
    data = path.read_bytes()
    for number, broken in enumerate([data[:-3], data[:40], data[:5], b"", b"not safetensors at all, just text", data + b"x"]):
        broken_path = tmp_path / f"broken{number}.safetensors"
        broken_path.write_bytes(broken)
        with pytest.raises(IngredientMismatch, match="store the weights again"):
            open_weights(broken_path)


WHOLE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"w": {"dtype": "F32", "shape": [2]}}, r"`w` in `odd\.safetensors` has no type, shape and place \('data_offsets'\)"),
        ({"w": WHOLE | {"data_offsets": [0]}}, "no type, shape and place"),
        ({"w": WHOLE | {"data_offsets": [0, "8"]}}, "no type, shape and place"),
        ({"w": WHOLE | {"data_offsets": [0, 4]}}, r"`w` in `odd\.safetensors` is F32 \[2\] in bytes 0 to 4"),
        ({"w": WHOLE | {"data_offsets": [-8, 0]}}, "is F32 .* in bytes -8 to 0"),
        ({"w": WHOLE | {"shape": 2}}, "no type, shape and place"),
        ({"w": WHOLE | {"shape": [-1, -2]}}, r"is F32 \[-1, -2\] in bytes"),
        ({"w": 8}, "no type, shape and place"),
        ({"w": WHOLE, "__metadata__": None}, r"`odd\.safetensors` has a header whose metadata is not Stockpot's"),
        ({"w": WHOLE, "__metadata__": {"stockpot": "{}"}}, "metadata is not Stockpot's"),
        ({"w": WHOLE, "__metadata__": {"stockpot": '{"tied": {"v": "gone"}}'}}, r"metadata is not Stockpot's \('gone'\)"),
    ],
)
def test_a_header_that_describes_no_tensors_ends_in_a_sentence(tmp_path: Path, header: dict[str, object], told: str) -> None:
    path, text = tmp_path / "odd.safetensors", json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(IngredientMismatch, match=f"{told}.*; store the weights again"):
        open_weights(path)


def test_a_nan_is_found_by_name(tmp_path: Path) -> None:
    (state,) = random_states(7, 1)
    state["body.bias"][3] = float("nan")
    assert first_non_finite(stored(tmp_path, [state])[0]) == "body.bias"


class Linear:
    """A tiny pool: one linear classifier per trial, averaged and scored exactly."""

    def __init__(self, seed: int, trials: int, samples: int, spread: float) -> None:
        rng = torch.Generator().manual_seed(seed)
        truth = torch.randn(4, 3, generator=rng)
        self.x = torch.randn(samples, 4, generator=rng)
        self.labels = (self.x @ truth).argmax(1)
        self.weights = {f"t{number:02d}": truth + spread * torch.randn(4, 3, generator=rng) for number in range(trials)}
        if trials > 2:
            self.weights["t01"] = self.weights["t00"].clone()  # a duplicate, so a tie

    def score(self, trials: Sequence[str], need: int = 0) -> Accuracy:
        mean = torch.stack([self.weights[trial].double() for trial in sorted(trials)]).mean(0).float()
        return Accuracy(correct=int(right(self.x @ mean, self.labels).sum()), seen=len(self.labels))

    def fully(self, trials: Sequence[str], need: int) -> Verdict:
        return Verdict(self.score(trials), len(self.labels))

    def logits(self, trials: Sequence[str]) -> Tensor:
        return self.x @ torch.stack([self.weights[trial].double() for trial in sorted(trials)]).mean(0).float()

    def preranked(self, soup: Sequence[str], left: Sequence[str]) -> list[str]:
        return by_averaged_logits({trial: self.logits([trial]) for trial in self.weights}, self.labels, soup, left)

    def early(self, block: int) -> Score:
        """As the kitchen does it: doubtful samples first, no further than the fate is open."""

        def score(trials: Sequence[str], need: int) -> Verdict:
            logits = self.logits(trials)
            order = doubtful_first(self.logits(trials[:-1]), len(trials) - 1, self.logits(trials[-1:]), self.labels)
            return examine(lambda numbers: logits[numbers], self.labels, order, need, block)[0]

        return score


def reference(pool: Linear, accept: str) -> list[tuple[str, int, bool]]:
    """The paper's loop in the plainest words: (trial, correct with it, kept)."""
    singles = {trial: pool.score([trial]).correct for trial in pool.weights}
    order = sorted(singles, key=lambda trial: (-singles[trial], trial))
    soup, best = [order[0]], singles[order[0]]
    told = [(order[0], best, True)]
    for trial in order[1:]:
        correct = pool.score([*soup, trial]).correct
        kept = correct > best or (accept == "not_worse" and correct == best)
        if kept:
            soup, best = [*soup, trial], correct
        told.append((trial, correct, kept))
    return told


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 100_000),
    trials=st.integers(1, 9),
    samples=st.integers(5, 60),
    spread=st.floats(0.1, 4),
    accept=st.sampled_from(["improve", "not_worse"]),
)
def test_greedy_decides_as_the_reference_loop(seed: int, trials: int, samples: int, spread: float, accept: str) -> None:
    pool = Linear(seed, trials, samples, spread)
    steps = greedy({trial: pool.score([trial]) for trial in pool.weights}, pool.fully, accept)  # type: ignore[arg-type]
    assert [(step.trial_id, step.after.correct, step.kept) for step in steps] == reference(pool, accept)
    assert pool.score(members(steps)).correct >= max(pool.score([trial]).correct for trial in pool.weights)


def averaged(pool: Linear, trials: Sequence[str]) -> int:
    """Right answers of averaged logits, sample by sample in plain floats."""
    rows = [[[float(value) for value in row] for row in pool.logits([trial])] for trial in trials]
    means = [[sum(one[sample][label] for one in rows) / len(rows) for label in range(3)] for sample in range(len(pool.labels))]
    return sum(mean.index(max(mean)) == int(label) for mean, label in zip(means, pool.labels, strict=True))


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 100_000), trials=st.integers(1, 6), samples=st.integers(5, 30), spread=st.floats(0.1, 4),
    budget=st.none() | st.integers(1, 5),
)  # fmt: skip
def test_preranked_greedy_asks_next_for_the_best_averaged_logits(
    seed: int, trials: int, samples: int, spread: float, budget: int | None
) -> None:
    pool = Linear(seed, trials, samples, spread)
    held_out = {trial: pool.score([trial]) for trial in pool.weights}
    steps = greedy(held_out, pool.fully, rank=pool.preranked, budget=budget)
    left = ranked(held_out)
    soup = [left.pop(0)]
    best = held_out[soup[0]].correct
    for step in steps[1:]:
        counts = {trial: averaged(pool, [*soup, trial]) for trial in left}
        following = max(left, key=lambda trial: counts[trial])  # the first of equals, in greedy's own order
        assert step.trial_id == following
        left.remove(following)
        correct = pool.score([*soup, following]).correct
        assert (step.after.correct, step.kept) == (correct, correct > best)
        soup, best = ([*soup, following], correct) if correct > best else (soup, best)
    assert len(steps) - 1 == min(len(held_out) - 1, budget or len(held_out))


def test_ties_go_to_the_smaller_id() -> None:
    assert ranked({"b": Accuracy(correct=3, seen=4), "a": Accuracy(correct=3, seen=4), "c": Accuracy(correct=4, seen=4)}) == ["c", "a", "b"]


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 100_000),
    trials=st.integers(1, 9),
    samples=st.integers(5, 80),
    spread=st.floats(0.1, 4),
    block=st.integers(1, 40),
    accept=st.sampled_from(["improve", "not_worse"]),
    passes=st.integers(1, 3),
    replacement=st.booleans(),
    shuffle=st.booleans(),
    preranked=st.booleans(),
    budget=st.none() | st.integers(1, 6),
    broken=st.booleans(),
)
def test_early_rejection_changes_no_decision_and_no_soup(
    seed: int,
    trials: int,
    samples: int,
    spread: float,
    block: int,
    accept: str,
    passes: int,
    replacement: bool,
    shuffle: bool,
    preranked: bool,
    budget: int | None,
    broken: bool,
) -> None:
    pool = Linear(seed, trials, samples, spread)
    if broken and trials > 3:
        pool.weights["t03"][0, 0] = float("nan")
    held_out = {trial: pool.score([trial]) for trial in pool.weights}
    order = shuffled(held_out, seed) if shuffle else None
    rank = pool.preranked if preranked else None
    options = {"passes": passes, "replacement": replacement, "order": order, "rank": rank, "budget": budget}
    slow = greedy(held_out, pool.fully, accept, **options)  # type: ignore[arg-type]
    fast = greedy(held_out, pool.early(block), accept, **options)  # type: ignore[arg-type]
    assert [(step.trial_id, step.kept, step.size, step.before) for step in fast] == [
        (step.trial_id, step.kept, step.size, step.before) for step in slow
    ]
    assert all(quick.after.correct >= full.after.correct for quick, full in zip(fast, slow, strict=True))
    assert all(quick.after == full.after for quick, full in zip(fast, slow, strict=True) if quick.exact)
    assert all(step.exact for step in fast if step.kept)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 100_000), trials=st.integers(1, 9), spread=st.floats(0.1, 4), devices=st.integers(1, 4), passes=st.integers(1, 3)
)
def test_scoring_ahead_on_several_devices_is_the_sequential_result(
    seed: int, trials: int, spread: float, devices: int, passes: int
) -> None:
    pool = Linear(seed, trials, 60, spread)
    held_out = {trial: pool.score([trial]) for trial in pool.weights}
    alone = greedy(held_out, pool.early(7), passes=passes, replacement=True)
    with Speculation([pool.early(7)] * devices) as crowd:
        assert greedy(held_out, crowd.score, passes=passes, replacement=True, ahead=crowd.ahead) == alone
    if devices == 1:
        assert crowd.wasted == []


def test_answers_nobody_asked_for_are_told_apart() -> None:
    together = Barrier(2)

    def score(trials: Sequence[str], need: int) -> Verdict:
        together.wait(10)  # so that both devices have begun
        return Verdict(Accuracy(correct=need, seen=9), 9, passes=len(trials))

    with Speculation([score, score]) as crowd:
        crowd.ahead([(("a", "b"), 5), (("a", "c", "d"), 5), (("a", "e"), 5)])
        assert crowd.score(["a", "b"], 5).accuracy.correct == 5
        crowd.ahead([])  # it was kept: what was said about the others is of no use
    assert [answer.passes for answer in crowd.wasted] == [3]


def test_a_rejection_looks_at_little_more_than_its_floor() -> None:
    pool = Linear(3, 2, 4000, 0.5)
    best = max(pool.score([trial]).correct for trial in pool.weights)
    verdict = pool.early(1)(["t00", "t01"], best + 200)
    assert verdict.accuracy.correct < best + 200
    assert floor(best + 200, 4000) <= verdict.examined / 4000 <= 1.25 * floor(best + 200, 4000)


def test_how_loud_a_candidate_speaks_does_not_change_where_it_is_doubted() -> None:
    rng = torch.Generator().manual_seed(0)
    soup, candidate, labels = torch.randn(200, 5, generator=rng), torch.randn(200, 5, generator=rng), torch.arange(200) % 5
    order = doubtful_first(soup, 3, candidate, labels)
    assert torch.equal(doubtful_first(4 * soup, 3, candidate / 2, labels), order)  # powers of two, so to the bit
    assert torch.equal(doubtful_first(soup, 3, torch.zeros(200, 5), labels), margins(soup, labels).argsort(stable=True))


def test_margins_are_negative_exactly_where_the_answer_is_wrong() -> None:
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 5
    assert torch.equal(margins(logits, labels) < 0, logits.argmax(1) != labels)


def test_with_replacement_a_member_may_count_twice() -> None:
    seen = 10
    table = {("a",): 5, ("b",): 4, ("a", "b"): 6, ("a", "a"): 5, ("a", "b", "a"): 7, ("a", "b", "b"): 6, ("a", "b", "a", "b"): 7}

    def score(trials: Sequence[str], need: int) -> Verdict:
        return Verdict(Accuracy(correct=table.get(tuple(trials), 0), seen=seen), seen)

    held_out = {"a": Accuracy(correct=5, seen=seen), "b": Accuracy(correct=4, seen=seen)}
    assert members(greedy(held_out, score, passes=3, replacement=True)) == ("a", "b", "a")
    assert members(greedy(held_out, score, passes=3)) == ("a", "b")
