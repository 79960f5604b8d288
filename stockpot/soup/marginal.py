"""What one more trial is worth: the greedy soup's held-out accuracy against the number of trials it could choose from (Wortsman et al.
2022, arXiv:2203.05482, figure B.1), and when to stop. Numbers in, numbers out.

Soups of the first 1, 2, 4, 8, ... trials grow about evenly with every doubling while a sweep still helps, so the next trial is expected to
bring that doubling's gain times log2(1 + 1/n). The estimate ignores that counts jump: judge it against one sample's worth of accuracy.
"""

import math
from collections.abc import Sequence

from stockpot.config import StopSpec
from stockpot.outcomes import Accuracy, Enough, MarginalPoint

DOUBLINGS = 2
"""Steps of the curve the expected gain is taken from: one is noise, more reach back to where everything helped."""


def sizes(trials: int) -> list[int]:
    """Where the curve is measured: powers of two below the number of trials, and that number."""
    return [2**power for power in range(max(0, (trials - 1).bit_length())) if 2**power < trials] + [trials]


def curve(soups: Sequence[tuple[int, Accuracy]], seconds: Sequence[float]) -> tuple[MarginalPoint, ...]:
    """Points from (number of trials, their greedy soup's accuracy) and what each trial cost, in the order they were drawn.

    seconds: of an accelerator, those of all its devices together. A point's gains are over the point before it: per trial, and per hour of
    an accelerator.
    """
    points: list[MarginalPoint] = []
    for trials, held_out in soups:
        hours = sum(seconds[:trials]) / 3600
        last = points[-1] if points else None
        gain = held_out.value - last.held_out.value if last else 0.0
        points.append(
            MarginalPoint(
                trials=trials,
                held_out=held_out,
                accelerator_hours=hours,
                gain_per_trial=gain / (trials - last.trials) if last else None,
                gain_per_hour=gain / (hours - last.accelerator_hours) if last and hours > last.accelerator_hours else None,
            )
        )
    return tuple(points)


def expected_gain(points: Sequence[MarginalPoint]) -> float | None:
    """Held-out accuracy, as a fraction, that one more trial is expected to add; None while there are fewer than two points."""
    some = points[-1 - DOUBLINGS :]
    if len(some) < 2:
        return None
    gain, doublings = some[-1].held_out.value - some[0].held_out.value, math.log2(some[-1].trials / some[0].trials)
    return max(0.0, gain / doublings * math.log2(1 + 1 / some[-1].trials))


def enough(points: Sequence[MarginalPoint], rule: StopSpec) -> Enough | None:
    """`Enough` when so many trials finished as the rule wants and the expected gain of one more is below its threshold; None to go on."""
    expected = expected_gain(points)
    if expected is None or points[-1].trials < rule.after or expected >= rule.below:
        return None
    return Enough(rule=rule, expected_gain=expected, curve=tuple(points))
