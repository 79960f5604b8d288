"""Guards: the gate's verdict follows from the evidence alone, tolerance by tolerance, can be taken again from what is stored, and models
that cannot be compared are not."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.config import GateSpec
from stockpot.digests import digest
from stockpot.errors import RegistryError
from stockpot.release.judging import Answers, Contender, Evidence, Judgement, judge, replay
from stockpot.soup.statistics import bootstrap, mcnemar
from tests.tiny_sweep import CLASSES, PREPROCESS

CHAMPION = Contender(version=1, weights_sha256="a", weights_bytes=1000, classes=CLASSES, preprocess=PREPROCESS)
CHALLENGER = CHAMPION.model_copy(update={"version": 2, "weights_sha256": "b", "weights_bytes": 1040})


def answers(champion: int, challenger: int, seen: int = 200) -> Answers:
    told = {"champion": champion, "challenger": challenger}
    return Answers(snapshot_digest="d", split="gate", **{side: "1" * count + "0" * (seen - count) for side, count in told.items()})


def evidence(challenger: int, shift: int, spec: GateSpec, calibration: float = 0.05) -> Evidence:
    return Evidence(
        spec=spec,
        champion=CHAMPION,
        challenger=CHALLENGER,
        gate=answers(190, challenger),
        shifts={"blur": answers(100, shift)},
        calibration_error={"champion": 0.02, "challenger": calibration},
        seconds_per_image=((0.010, 0.011), (0.010, 0.900), (0.020, 0.022)),
    )


@pytest.mark.parametrize(
    ("challenger", "shift", "spec", "promoted", "told"),
    [
        (190, 100, GateSpec(), True, "no loss above"),
        (189, 100, GateSpec(), False, "loses 0.50 points"),
        (188, 100, GateSpec(gate_tolerance=0.01), True, "no loss above"),
        (187, 100, GateSpec(gate_tolerance=0.01), False, "loses 1.50 points on the gate split"),
        (195, 96, GateSpec(shift_tolerance=0.02), True, "no loss above"),
        (195, 95, GateSpec(shift_tolerance=0.02), False, "shift suite blur"),
        (195, 90, GateSpec(suite_tolerances={"blur": 0.05}), True, "no loss above"),
        (195, 95, GateSpec(gate_tolerance=0.5, suite_tolerances={"noise": 0.5}), False, "shift suite blur"),
        (195, 100, GateSpec(calibration_tolerance=0.01), False, "calibration error is 3.00 points higher, 1.00 are tolerated"),
        (195, 100, GateSpec(calibration_tolerance=0.03), True, "no loss above"),
        (195, 100, GateSpec(latency_tolerance=0.05), False, "takes 10.0 % longer for an image, 5.00 are tolerated"),
        (195, 100, GateSpec(latency_tolerance=0.1), True, "no loss above"),
        (195, 100, GateSpec(size_tolerance=0.0), False, "weights are 4.0 % larger"),
        (195, 100, GateSpec(size_tolerance=0.04), True, "no loss above"),
    ],
)
def test_the_rule(challenger: int, shift: int, spec: GateSpec, promoted: bool, told: str) -> None:
    decision = judge(evidence(challenger, shift, spec))
    assert decision.promoted is promoted
    assert told in decision.reason
    assert (decision.champion_before, decision.gate_digest) == (1, digest(spec))


@settings(max_examples=20)
@given(thousandths=st.integers(0, 200), seen=st.integers(1, 8).map(lambda one: 1000 * one), beyond=st.integers(-1, 1))
def test_a_loss_of_the_tolerance_passes_and_one_sample_more_does_not(thousandths: int, seen: int, beyond: int) -> None:
    """Whole samples: no rounding of a tolerance takes one for another, however large the split is."""
    lost = max(0, thousandths * seen // 1000 + beyond)
    one = evidence(195, 100, GateSpec(gate_tolerance=thousandths / 1000))
    decision = judge(one.model_copy(update={"gate": answers(seen, seen - lost, seen)}))
    assert decision.promoted is (1000 * lost <= thousandths * seen)


def test_the_first_refusal_is_told_in_the_order_of_the_rule() -> None:
    one = evidence(180, 90, GateSpec(calibration_tolerance=0.01, latency_tolerance=0.05, size_tolerance=0.01))
    one = one.model_copy(update={"shifts": {"noise": answers(100, 80), "blur": answers(100, 90)}})
    changes: dict[str, dict[str, object]] = {
        "loses 5.00 points on the gate split": {"gate": answers(190, 190)},
        "loses 5.00 points on shift suite blur": {"shifts": {"noise": answers(100, 80)}},
        "loses 10.00 points on shift suite noise": {"shifts": {}},
        "calibration error is 3.00 points higher": {"calibration_error": {"champion": 0.05, "challenger": 0.02}},
        "takes 10.0 % longer": {"seconds_per_image": ((0.011, 0.010),)},
        "weights are 4.0 % larger": {"challenger": CHALLENGER.model_copy(update={"weights_bytes": 960})},
    }
    for told, mend in changes.items():
        assert told in judge(one).reason
        one = one.model_copy(update=mend)
    decision = judge(one)
    assert decision.promoted, "and what is better calibrated, faster and smaller is not refused for it"
    assert (decision.latency_ratio, decision.size_ratio) == (pytest.approx(10 / 11), 0.96)


def test_another_metric_is_judged_by_its_own_value_and_not_by_the_counts() -> None:
    """The counts say a gain, the metric a loss, and the other way round."""
    for counts, measured, promoted in (((190, 195), (0.9, 0.85), False), ((190, 180), (0.85, 0.9), True)):
        gate = answers(*counts).model_copy(update={"measured": dict(zip(("champion", "challenger"), measured, strict=True))})
        decision = judge(evidence(195, 100, GateSpec()).model_copy(update={"gate": gate}))
        assert decision.promoted is promoted
        assert f"{100 * (measured[1] - measured[0]):+.2f} points, 95 % interval of the accuracy" in decision.reason


def test_what_passes_may_wait_for_a_person_and_what_fails_does_not() -> None:
    for one, waits in ((evidence(195, 100, GateSpec(approval=True)), True), (evidence(180, 100, GateSpec(approval=True)), False)):
        decision = judge(one)
        assert (decision.promoted, decision.waits) == (False, waits)
        assert ("subject to approval: no loss above" in decision.reason) is waits
    first = judge(Evidence(spec=GateSpec(approval=True), challenger=CHALLENGER))
    assert (first.promoted, first.waits) == (False, True)


def test_every_comparison_is_paired_and_tested_and_one_slow_moment_changes_nothing() -> None:
    decision = judge(evidence(195, 97, GateSpec()))
    for one, (before, after) in ((decision.gate, (190, 195)), (decision.shifts["blur"], (100, 97))):
        assert one is not None
        sides = answers(before, after)
        assert (one.champion.correct, one.challenger.correct) == (before, after)
        assert one.p_value == mcnemar(sides.right("champion"), sides.right("challenger"))
        assert one.interval == bootstrap(sides.right("champion"), sides.right("challenger"))
    assert decision.latency_ratio == pytest.approx(1.1)


@settings(max_examples=30)
@given(
    champion=st.text("01", min_size=12, max_size=12), challenger=st.text("01", min_size=12, max_size=12),
    tolerance=st.floats(0, 1), seconds=st.lists(st.tuples(st.floats(1e-4, 1), st.floats(1e-4, 1)), min_size=1, max_size=5),
)  # fmt: skip
def test_the_stored_judgement_gives_the_same_verdict(
    champion: str, challenger: str, tolerance: float, seconds: list[tuple[float, float]]
) -> None:
    one = Evidence(
        spec=GateSpec(gate_tolerance=tolerance, latency_tolerance=tolerance), champion=CHAMPION, challenger=CHALLENGER,
        gate=Answers(snapshot_digest="d", split="gate", champion=champion, challenger=challenger),
        calibration_error={"champion": 0.1, "challenger": 0.2}, seconds_per_image=tuple(seconds),
    )  # fmt: skip
    judgement = Judgement(decision=judge(one), evidence=one)
    assert replay(judgement.model_dump_json()) == judgement


@pytest.mark.parametrize("change", [("decision", "promoted"), ("evidence", "gate", "challenger"), ("evidence", "spec", "gate_tolerance")])
def test_a_changed_record_is_found(change: tuple[str, ...]) -> None:
    one = evidence(189, 100, GateSpec())
    stored = json.loads(Judgement(decision=judge(one), evidence=one).model_dump_json())
    inner = stored
    for name in change[:-1]:
        inner = inner[name]
    inner[change[-1]] = {"promoted": True, "challenger": "1" * 200, "gate_tolerance": 0.5}[change[-1]]
    with pytest.raises(RegistryError, match="does not follow from its evidence"):
        replay(json.dumps(stored))


def test_no_champion_and_one_that_cannot_be_compared() -> None:
    assert judge(Evidence(spec=GateSpec(), challenger=CHALLENGER)).reason == "Promoted: there is no champion to compare it with."
    for change, told in (
        ({"classes": ("red",)}, "knows other classes (1, the challenger 3, or in another order)"),
        ({"classes": CLASSES[::-1]}, "knows other classes (3, the challenger 3, or in another order)"),
        ({"preprocess": PREPROCESS.model_copy(update={"size": 8})}, "sees images prepared another way"),
    ):
        decision = judge(Evidence(spec=GateSpec(), champion=CHAMPION.model_copy(update=change), challenger=CHALLENGER))
        assert not decision.promoted
        assert told in decision.reason
        assert "`stockpot promote` it by hand" in decision.reason
