"""Guards: greedy decides as the paper's loop does, whatever order, early rejection or number of devices, for random pools and ties."""

from collections.abc import Sequence
from itertools import accumulate
from statistics import mean, stdev
from threading import Barrier

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stockpot.evaluation import right
from stockpot.outcomes import Accuracy
from stockpot.soup.recipes.examining import Verdict, block_size, doubtful_first, examine, floor, margins
from stockpot.soup.recipes.greedy import Score, greedy, members, ranked, shuffled
from stockpot.soup.recipes.preranking import by_averaged_logits
from stockpot.soup.recipes.speculation import Speculation
from tests.waiting import PATIENCE_S


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


@settings(max_examples=60)
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


@settings(max_examples=25)
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


@settings(max_examples=100)
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


@settings(max_examples=40)
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
        together.wait(PATIENCE_S)  # so that both devices have begun
        return Verdict(Accuracy(correct=need, seen=9), 9, passes=len(trials))

    with Speculation([score, score]) as crowd:
        crowd.ahead([(("a", "b"), 5), (("a", "c", "d"), 5), (("a", "e"), 5)])
        assert crowd.score(["a", "b"], 5).accuracy.correct == 5
        crowd.ahead([])  # it was kept: what was said about the others is of no use
    assert [answer.passes for answer in crowd.wasted] == [3]


@settings(max_examples=60)
@given(seed=st.integers(0, 100_000), samples=st.integers(5, 80), spread=st.floats(0.1, 4), block=st.integers(1, 40), data=st.data())
def test_a_candidate_is_looked_at_to_the_block_of_its_first_error_too_many(
    seed: int, samples: int, spread: float, block: int, data: st.DataObject
) -> None:
    pool = Linear(seed, 2, samples, spread)
    logits, need = pool.logits(["t00", "t01"]), data.draw(st.integers(0, samples))
    wrong = (~right(logits, pool.labels)).tolist()

    def looked_at(order: Sequence[int], block: int) -> Verdict:
        return examine(lambda numbers: logits[numbers], pool.labels, torch.tensor(order), need, block)[0]

    order = data.draw(st.permutations(range(samples)))
    errors = [*accumulate(wrong[number] for number in order)]
    too_many = next((place for place, count in enumerate(errors, 1) if count > samples - need), samples)
    examined = min(samples, -(-too_many // block) * block)
    assert looked_at(order, block) == Verdict(Accuracy(correct=samples - errors[examined - 1], seen=samples), examined)
    worst_first = looked_at(sorted(range(samples), key=lambda number: not wrong[number]), 1)
    if sum(wrong) > samples - need:
        assert worst_first.examined / samples == floor(need, samples)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 100_000), trials=st.integers(1, 7), samples=st.integers(5, 40), spread=st.floats(0.1, 4),
    accept=st.sampled_from(["improve", "not_worse"]),
)  # fmt: skip
def test_greedy_asks_for_exactly_what_keeps_a_candidate(seed: int, trials: int, samples: int, spread: float, accept: str) -> None:
    pool = Linear(seed, trials, samples, spread)
    needs: list[int] = []

    def score(trials: Sequence[str], need: int) -> Verdict:
        needs.append(need)
        return pool.fully(trials, need)

    steps = greedy({trial: pool.score([trial]) for trial in pool.weights}, score, accept, passes=2, replacement=True)  # type: ignore[arg-type]
    assert [step.kept for step in steps[1:]] == [step.after.correct >= need for step, need in zip(steps[1:], needs, strict=True)]
    assert all(step.before and 0 <= need - step.before.correct <= 1 for step, need in zip(steps[1:], needs, strict=True))


@settings(max_examples=40)
@given(seed=st.integers(0, 100_000), size=st.integers(1, 9), loud=st.floats(0.1, 10))
def test_the_likeliest_errors_of_the_soup_with_one_more_come_first(seed: int, size: int, loud: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    soup, candidate = (torch.randn(30, 4, generator=rng, dtype=torch.float64) * by for by in (1, loud))
    labels = torch.randint(4, (30,), generator=rng)

    def spread(rows: list[list[float]]) -> float:
        return mean(stdev(row) for row in rows)

    soups, candidates = soup.tolist(), candidate.tolist()
    by, of = spread(soups), spread(candidates)
    found = []
    for one, two, label in zip(soups, candidates, labels.tolist(), strict=True):
        told = [size * a / by + b / of for a, b in zip(one, two, strict=True)]
        found.append(told.pop(label) - max(told))
    assert doubtful_first(soup, size, candidate, labels).tolist() == sorted(range(30), key=found.__getitem__)


@given(samples=st.integers(1, 10**6))
def test_a_block_is_a_sixty_fourth_of_the_split_within_what_devices_like(samples: int) -> None:
    block = block_size(samples)
    assert 32 <= block <= 256
    assert block == 32 or 64 * (block - 1) < samples
    assert block == 256 or 64 * block >= samples


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
