"""Guards: the gate's verdict follows from the evidence and the spec alone, tolerance by tolerance, and models that cannot be
compared are not."""

import pytest

from stockpot.config import GateSpec
from stockpot.models.classifier import ModelConfig
from stockpot.release.gating import Answers, Evidence, incomparable, judge
from tests.tiny_sweep import ARCH, CLASSES, PREPROCESS


def answers(champion: int, challenger: int, seen: int = 200) -> Answers:
    told = {"champion": champion, "challenger": challenger}
    return Answers(snapshot_digest="d", split="gate", **{side: "1" * count + "0" * (seen - count) for side, count in told.items()})


def evidence(challenger: int, shift: int, spec: GateSpec, calibration: float = 0.05) -> Evidence:
    return Evidence(
        champion=1,
        challenger=2,
        weights_sha256={"champion": "a", "challenger": "b"},
        gate=answers(190, challenger),
        shifts={"blur": answers(100, shift)},
        calibration_error={"champion": 0.02, "challenger": calibration},
        spec=spec,
    )


@pytest.mark.parametrize(
    ("challenger", "shift", "spec", "promoted", "told"),
    [
        (190, 100, GateSpec(), True, "no loss above"),
        (189, 100, GateSpec(), False, "loses 0.50 points"),
        (188, 100, GateSpec(gate_tolerance=0.01), True, "no loss above"),
        (187, 100, GateSpec(gate_tolerance=0.01), False, "loses 1.50 points on the gate split, 1.00 are tolerated"),
        (195, 96, GateSpec(shift_tolerance=0.02), True, "no loss above"),
        (195, 95, GateSpec(shift_tolerance=0.02), False, "shift suite blur"),
        (195, 90, GateSpec(suite_tolerances={"blur": 0.05}), True, "no loss above"),
        (195, 100, GateSpec(calibration_tolerance=0.01), False, "calibration error is 3.00 points higher"),
        (195, 100, GateSpec(calibration_tolerance=0.03), True, "no loss above"),
    ],
)
def test_the_rule(challenger: int, shift: int, spec: GateSpec, promoted: bool, told: str) -> None:
    decision = judge(evidence(challenger, shift, spec))
    assert decision.promoted is promoted
    assert told in decision.reason


def test_the_evidence_survives_being_stored_and_gives_the_same_verdict() -> None:
    one = evidence(195, 99, GateSpec())
    assert judge(Evidence.model_validate_json(one.model_dump_json())) == judge(one)
    assert judge(one).interval is not None


def test_other_classes_or_another_transform_are_not_compared() -> None:
    config = ModelConfig(kind="open_clip", arch=ARCH, preprocess=PREPROCESS, classes=CLASSES)
    assert incomparable(config, config) is None
    assert "other classes" in (incomparable(config, config.model_copy(update={"classes": ("red",)})) or "")
    other = config.model_copy(update={"preprocess": PREPROCESS.model_copy(update={"size": 8})})
    assert "prepared another way" in (incomparable(config, other) or "")
