"""The greedy soup (Wortsman et al. 2022, arXiv:2203.05482, recipe 1): visit ingredients from the best to the worst, keep one when the soup
with it is better on held_out. Every decision is an integer comparison (of accuracies; another metric is compared as it is) and is recorded.

Order: held-out correct answers, most first; ties by trial id, smallest first. (The reference code visits ties in reverse input order,
and keeps on strict improvement; the paper's text allows a tie. Here strict is the default, a tie is `accept="not_worse"`.)
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from stockpot.outcomes import Accuracy, GreedyStep
from stockpot.soup.recipes.examining import Verdict

Accept = Literal["improve", "not_worse"]
Score = Callable[[Sequence[str], int], Verdict]
"""(trial ids of a candidate, the newest last; correct answers it needs) -> what was found."""
Rank = Callable[[Sequence[str], Sequence[str]], list[str]]
"""(trial ids of the soup so far, those still to visit in the order of `order`) -> the order to visit them in."""
Question = tuple[tuple[str, ...], int]
"""What `Score` is asked."""


def ranked(held_out: Mapping[str, Accuracy]) -> list[str]:
    """Trial ids in the order greedy visits them."""
    return sorted(held_out, key=lambda trial: (-held_out[trial].value, trial))


def shuffled(held_out: Mapping[str, Accuracy], seed: int) -> list[str]:
    """The best ingredient first, the others in a random order: shows how much the order matters."""
    first, *others = ranked(held_out)
    random.Random(f"stockpot/greedy/{seed}").shuffle(others)
    return [first, *others]


def greedy(
    held_out: Mapping[str, Accuracy],
    score: Score,
    accept: Accept = "improve",
    *,
    passes: int = 1,
    replacement: bool = False,
    order: Sequence[str] | None = None,
    rank: Rank | None = None,
    budget: int | None = None,
    ahead: Callable[[Sequence[Question]], None] | None = None,
) -> list[GreedyStep]:
    """The decisions in order; those kept are the soup, a trial kept twice counts twice.

    held_out: each ingredient's own accuracy, by trial id, at least one. passes: how often the ingredients are visited; a pass that keeps
    nothing is the last. replacement: later visits may add a member again. order: None is `ranked`. rank: puts the rest of a pass in an
    order of its own for the soup so far, whenever that grew. budget: candidates that are scored at the most. ahead: told before each
    question what the questions of this pass are from it on, if every candidate is left out.
    """
    order = list(order or ranked(held_out))
    rank = rank or (lambda _soup, left: list(left))
    best = held_out[order[0]]
    steps = [GreedyStep(trial_id=order[0], before=None, after=best, kept=True, size=1, examined=best.seen)]
    soup = order[:1]
    for number in range(passes):
        size = len(soup)
        left = [one for one in (order[1:] if number == 0 else order) if replacement or one not in soup]
        queue = rank(soup, left)
        while queue and (budget is None or len(steps) <= budget):
            need = _needed(best, accept)
            if ahead:
                ahead([((*soup, one), need) for one in queue])
            trial, *queue = queue
            after, examined, _ = score([*soup, trial], need)
            kept = after.value > best.value or (accept == "not_worse" and after.value == best.value)
            if kept:
                soup.append(trial)
                queue = rank(soup, [one for one in left if one in queue])
            steps.append(GreedyStep(trial_id=trial, before=best, after=after, kept=kept, size=len(soup), examined=examined))
            best = after if kept else best
        if len(soup) == size:
            break
    return steps


def _needed(best: Accuracy, accept: Accept) -> int:
    """Correct answers without which a candidate is lost: none where another metric than accuracy decides, so that all is looked at."""
    return 0 if best.other is not None else best.correct + (1 if accept == "improve" else 0)


def members(steps: Sequence[GreedyStep]) -> tuple[str, ...]:
    """Trial ids in the soup, in the order they were added."""
    return tuple(step.trial_id for step in steps if step.kept)
