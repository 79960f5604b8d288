"""The gate: champion against challenger on samples nothing was selected on. What both models got right, sample by sample, is the evidence;
the verdict is a pure function of it and of the spec, so it can be taken again offline from the stored JSON.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stockpot.checkpoints import load_weights
from stockpot.config import Closed, GateSpec, PinnedSnapshot, Sweep
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot
from stockpot.evaluation import logits
from stockpot.models.classifier import ModelConfig, build
from stockpot.models.loading import load_state
from stockpot.outcomes import Accuracy, GateDecision
from stockpot.soup.statistics import bootstrap, calibration_error, mcnemar, right

Side = Literal["champion", "challenger"]

# N samples, C classes


class Answers(Closed):
    """Both models on one split: a character per sample, `1` right and `0` wrong, in the snapshot's order."""

    snapshot_digest: str
    split: str
    champion: str
    challenger: str

    def right(self, side: Side) -> Tensor:
        """bool (N,)."""
        return torch.tensor([answer == "1" for answer in getattr(self, side)])

    def accuracy(self, side: Side) -> Accuracy:
        """The counts."""
        answers: str = getattr(self, side)
        return Accuracy(correct=answers.count("1"), seen=len(answers))

    @property
    def loss(self) -> float:
        """Accuracy the challenger loses, as a fraction; negative is a gain."""
        return (self.champion.count("1") - self.challenger.count("1")) / len(self.champion)


class Evidence(Closed):
    """Everything the verdict rests on."""

    format: Literal["stockpot-gate/1"] = "stockpot-gate/1"
    champion: int = Field(description="Version number.")
    challenger: int = Field(description="Version number.")
    weights_sha256: dict[Side, str]
    gate: Answers
    shifts: dict[str, Answers]
    calibration_error: dict[Side, float] = Field(description="Expected calibration error on the gate split, 15 bins.")
    spec: GateSpec


def judge(evidence: Evidence) -> GateDecision:
    """The verdict: no loss above its tolerance, on the gate split first, then on every suite, then of calibration."""
    before, after = evidence.gate.right("champion"), evidence.gate.right("challenger")
    p_value, interval = mcnemar(before, after), bootstrap(before, after)
    reason = _refusal(evidence)
    low, high = (100 * end for end in interval)
    gain = f"{-100 * evidence.gate.loss:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}, exact McNemar p = {p_value:.3g}"
    told = f"gate split: {_told(evidence.gate)}, {gain}"
    return GateDecision(
        promoted=reason is None,
        reason=f"Promoted: no loss above the tolerances ({told})." if reason is None else f"Stays challenger: {reason} ({told}).",
        champion_before=evidence.champion,
        gate={side: evidence.gate.accuracy(side) for side in ("champion", "challenger")},
        p_value=p_value,
        interval=interval,
        calibration_error=dict(evidence.calibration_error),
        shifts={name: {side: one.accuracy(side) for side in ("champion", "challenger")} for name, one in evidence.shifts.items()},
    )


def gather_evidence(
    sweep: Sweep, folders: dict[Side, Path], versions: dict[Side, int], sha256: dict[Side, str], spec: GateSpec
) -> Evidence:
    """Score both models, each prepared as its own config says, on the sweep's gate split and shift suites."""
    taster = {side: _Taster(folder) for side, folder in folders.items()}
    gate = {side: one.logits(sweep.data.snapshot, "gate") for side, one in taster.items()}
    return Evidence(
        champion=versions["champion"],
        challenger=versions["challenger"],
        weights_sha256=sha256,
        gate=_answers(sweep.data.snapshot, "gate", gate),
        shifts={
            name: _answers(pinned, "test", {side: one.logits(pinned, "test") for side, one in taster.items()})
            for name, pinned in sweep.data.shifts.items()
        },
        calibration_error={side: calibration_error(*answer) for side, answer in gate.items()},
        spec=spec,
    )


def incomparable(champion: ModelConfig, challenger: ModelConfig) -> str | None:
    """Why two models may not be compared on one set of pixels and labels; None when they may."""
    if champion.classes != challenger.classes:
        other = "knows other classes"
    elif champion.preprocess != challenger.preprocess:
        other = "sees images prepared another way"
    else:
        return None
    return f"Stays challenger: the champion {other}, so no comparison is fair; `stockpot promote` it by hand if the change is meant."


def read_config(folder: Path) -> ModelConfig:
    """The config beside a version's weights."""
    return ModelConfig.model_validate_json((folder / "model.json").read_bytes())


class _Taster:
    """One version, loaded."""

    def __init__(self, folder: Path) -> None:
        self._config = read_config(folder)
        self._model = build(self._config)
        load_state(self._model, load_weights(folder / "model.safetensors"))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def logits(self, pinned: PinnedSnapshot, split: str) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and labels (N,)."""
        seen = pixels(open_snapshot(pinned), split, self._config.preprocess)
        return logits(self._model, seen.images, self._config.preprocess, device=self._device), torch.as_tensor(seen.labels)


def _answers(pinned: PinnedSnapshot, split: str, sides: dict[Side, tuple[Tensor, Tensor]]) -> Answers:
    told = {side: "".join("1" if one else "0" for one in right(*answer).tolist()) for side, answer in sides.items()}
    return Answers(snapshot_digest=pinned.digest, split=split, champion=told["champion"], challenger=told["challenger"])


def _refusal(evidence: Evidence) -> str | None:
    spec = evidence.spec
    if evidence.gate.loss > spec.gate_tolerance + 1e-9:
        return f"it loses {100 * evidence.gate.loss:.2f} points on the gate split, {100 * spec.gate_tolerance:.2f} are tolerated"
    for name, one in evidence.shifts.items():
        tolerance = spec.suite_tolerances.get(name, spec.shift_tolerance)
        if one.loss > tolerance + 1e-9:
            return f"it loses {100 * one.loss:.2f} points on shift suite {name} ({_told(one)}), {100 * tolerance:.2f} are tolerated"
    worse = evidence.calibration_error["challenger"] - evidence.calibration_error["champion"]
    if spec.calibration_tolerance is not None and worse > spec.calibration_tolerance + 1e-9:
        return f"its calibration error is {100 * worse:.2f} points higher, {100 * spec.calibration_tolerance:.2f} are tolerated"
    return None


def _told(one: Answers) -> str:
    pair = {side: one.accuracy(side) for side in ("challenger", "champion")}
    return ", ".join(f"{side} {100 * score.value:.2f} % ({score.correct} of {score.seen})" for side, score in pair.items())
