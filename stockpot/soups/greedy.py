"""The greedy soup (Wortsman et al. 2022, arXiv:2203.05482, recipe 1): visit ingredients from the best to the worst, keep one when the soup
with it is better on held_out. Every decision is an integer comparison and is recorded.

Order: held-out correct answers, most first; ties by trial id, smallest first. (The reference code visits ties in reverse input order,
and keeps on strict improvement; the paper's text allows a tie. Here strict is the default, a tie is `accept="not_worse"`.)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from stockpot.outcomes import Accuracy, GreedyStep

Accept = Literal["improve", "not_worse"]
Score = Callable[[Sequence[str], int], Accuracy]
"""(trial ids of a candidate, correct answers it needs) -> its held-out accuracy. Where it cannot reach what it needs, `correct` may be any
upper bound below that: the decision is the same."""


def ranked(held_out: Mapping[str, Accuracy]) -> list[str]:
    """Trial ids in the order greedy visits them."""
    return sorted(held_out, key=lambda trial: (-held_out[trial].correct, trial))


def greedy(held_out: Mapping[str, Accuracy], score: Score, accept: Accept = "improve") -> list[GreedyStep]:
    """The decisions, one per ingredient, in order; those kept are the soup.

    held_out: each ingredient's own accuracy, by trial id, at least one. score: called once per ingredient but the first.
    """
    order = ranked(held_out)
    best = held_out[order[0]]
    steps = [GreedyStep(trial_id=order[0], before=None, after=best, kept=True, size=1)]
    soup = order[:1]
    for trial in order[1:]:
        need = best.correct + (1 if accept == "improve" else 0)
        after = score([*soup, trial], need)
        kept = after.correct >= need
        if kept:
            soup.append(trial)
        steps.append(GreedyStep(trial_id=trial, before=best, after=after, kept=kept, size=len(soup)))
        best = after if kept else best
    return steps


def members(steps: Sequence[GreedyStep]) -> tuple[str, ...]:
    """Trial ids in the soup, in the order they were added."""
    return tuple(step.trial_id for step in steps if step.kept)
