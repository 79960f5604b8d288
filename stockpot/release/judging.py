"""The verdict of the gate: a pure function of the evidence and of the spec in it, so it can be taken again, offline, from the stored JSON.

What both models got right, sample by sample, is the heart of the evidence. The rule: no loss above its tolerance, on the gate split first,
then on every shift suite, then of calibration, of latency, of size. Ignores significance: p-values and intervals are told, not judged,
because a gate split of a few hundred images cannot show a point of loss or gain (CONTRIBUTING, negative results).
"""

from statistics import median
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stockpot.config import GateSpec
from stockpot.digests import digest
from stockpot.errors import RegistryError
from stockpot.fields import Closed
from stockpot.ledger.records import parsed
from stockpot.outcomes import Accuracy, GateDecision, Paired
from stockpot.preparation import Preparation
from stockpot.soup.statistics import bootstrap, mcnemar

Side = Literal["champion", "challenger"]

EPSILON = 1e-9
"""Fractions of samples are compared with tolerances; 0.02 is not a binary number."""


class Answers(Closed):
    """Both models on one split: a character per sample, `1` right and `0` wrong, in the snapshot's order."""

    snapshot_digest: str
    split: str
    champion: str
    challenger: str
    measured: dict[Side, float] = Field(default_factory=dict, description="The request's metric, where it is another than accuracy.")

    def right(self, side: Side) -> Tensor:
        """bool (N,)."""
        return torch.tensor([answer == "1" for answer in getattr(self, side)])

    def accuracy(self, side: Side) -> Accuracy:
        """The counts."""
        answers: str = getattr(self, side)
        return Accuracy(correct=answers.count("1"), seen=len(answers), other=self.measured.get(side))


class Contender(Closed):
    """One of the two, as it was registered."""

    version: int
    weights_sha256: str
    weights_bytes: int
    classes: tuple[str, ...]
    preprocess: Preparation


class Evidence(Closed):
    """Everything the verdict rests on. Without a champion, or with one that cannot be compared, nothing is measured."""

    format: Literal["stockpot-gate/2"] = "stockpot-gate/2"
    spec: GateSpec
    challenger: Contender
    champion: Contender | None = None
    gate: Answers | None = None
    shifts: dict[str, Answers] = Field(default_factory=dict)
    calibration_error: dict[Side, float] = Field(default_factory=dict, description="Expected calibration error on the gate split, 15 bins.")
    seconds_per_image: tuple[tuple[float, float], ...] = Field((), description="Champion and challenger, timed in turn, pair by pair.")


class Judgement(Closed):
    """What is stored: the decision and all it follows from."""

    decision: GateDecision
    evidence: Evidence


def judge(evidence: Evidence) -> GateDecision:
    """The verdict."""
    champion, asked = evidence.champion, digest(evidence.spec)
    if champion is None:
        return _passed(GateDecision(promoted=False, reason="", gate_digest=asked), "there is no champion to compare it with", evidence.spec)
    if evidence.gate is None:
        reason = f"Stays challenger: {incomparable(champion, evidence.challenger)}."
        return GateDecision(promoted=False, reason=reason, gate_digest=asked, champion_before=champion.version)
    spec = evidence.spec
    gate = _paired(evidence.gate, spec.gate_tolerance)
    decision = GateDecision(
        promoted=False,
        reason="",
        gate_digest=asked,
        champion_before=champion.version,
        gate=gate,
        shifts={name: _paired(one, spec.suite_tolerances.get(name, spec.shift_tolerance)) for name, one in sorted(evidence.shifts.items())},
        calibration_error=dict(evidence.calibration_error),
        latency_ratio=median(after / before for before, after in evidence.seconds_per_image),
        size_ratio=evidence.challenger.weights_bytes / champion.weights_bytes,
    )
    if refusal := _refusal(decision, spec):
        return decision.model_copy(update={"reason": f"Stays challenger: {refusal} (gate split: {_told(gate)})."})
    return _passed(decision, f"no loss above the tolerances (gate split: {_told(gate)})", spec)


def replay(stored: bytes | str) -> Judgement:
    """Take the verdict again from a stored judgement. Raises `RegistryError` when it is not the recorded one, `RecordUnreadable`."""
    judgement = parsed(Judgement, stored, "The gate's evidence")
    again = judge(judgement.evidence)
    if again != judgement.decision:
        raise RegistryError(
            f"The recorded decision ({judgement.decision.reason}) does not follow from its evidence ({again.reason}); "
            "the record was changed: delete the version's tag `stockpot.decision`, and `stockpot soup SWEEP` judges it again."
        )
    return judgement


def incomparable(champion: Contender, challenger: Contender) -> str | None:
    """Why two models may not be compared on one set of pixels and labels; None when they may."""
    if champion.classes != challenger.classes:
        other = f"knows other classes ({len(champion.classes)}, the challenger {len(challenger.classes)}, or in another order)"
    elif champion.preprocess != challenger.preprocess:
        other = "sees images prepared another way"
    else:
        return None
    return f"the champion {other}, so no comparison is fair; `stockpot promote` it by hand if the change is meant"


def _passed(found: GateDecision, why: str, spec: GateSpec) -> GateDecision:
    told = "Passed the gate, subject to approval" if spec.approval else "Promoted"
    return found.model_copy(update={"promoted": not spec.approval, "waits": spec.approval, "reason": f"{told}: {why}."})


def _paired(answers: Answers, tolerance: float) -> Paired:
    before, after = answers.right("champion"), answers.right("challenger")
    return Paired(
        champion=answers.accuracy("champion"),
        challenger=answers.accuracy("challenger"),
        p_value=mcnemar(before, after),
        interval=bootstrap(before, after),
        tolerance=tolerance,
    )


def _refusal(found: GateDecision, spec: GateSpec) -> str | None:
    assert found.gate is not None
    for name, one in [("the gate split", found.gate), *[(f"shift suite {name}", one) for name, one in found.shifts.items()]]:
        if -one.gain > one.tolerance + EPSILON:
            return f"it loses {-100 * one.gain:.2f} points on {name} ({_told(one)}), {100 * one.tolerance:.2f} are tolerated"
    rises = {
        "its calibration error is {:.2f} points higher": (
            found.calibration_error["challenger"] - found.calibration_error["champion"],
            spec.calibration_tolerance,
        ),
        "it takes {:.1f} % longer for an image": ((found.latency_ratio or 1) - 1, spec.latency_tolerance),
        "its weights are {:.1f} % larger": ((found.size_ratio or 1) - 1, spec.size_tolerance),
    }
    for told, (rise, tolerance) in rises.items():
        if tolerance is not None and rise > tolerance + EPSILON:
            return f"{told.format(100 * rise)}, {100 * tolerance:.2f} are tolerated"
    return None


def _told(one: Paired) -> str:
    sides = ", ".join(
        f"{side} {100 * score.value:.2f} % ({score.correct} of {score.seen})"
        for side, score in (("challenger", one.challenger), ("champion", one.champion))
    )
    low, high = (100 * end for end in one.interval)
    of = "" if one.champion.other is None else " of the accuracy"
    return f"{sides}, {100 * one.gain:+.2f} points, 95 % interval{of} {low:+.2f} to {high:+.2f}, exact McNemar p = {one.p_value:.3g}"
