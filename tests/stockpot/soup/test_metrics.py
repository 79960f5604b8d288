"""Promise: macro F1 and the Matthews correlation are scikit-learn's, and where a request asks for one, it ranks, decides and judges."""

from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from sklearn.metrics import f1_score, matthews_corrcoef

from stockpot.checkpoints import load_weights
from stockpot.config import GateSpec, SoupSpec
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot
from stockpot.evaluation import accuracy, logits
from stockpot.fields import Metric
from stockpot.ledger import tracking
from stockpot.ledger.connection import fetch_file
from stockpot.models.folders import read_model
from stockpot.outcomes import Accuracy, ModelVersion
from stockpot.release.gating import gather_evidence
from stockpot.release.judging import Judgement, judge, replay
from stockpot.soup.recipes.examining import Verdict
from stockpot.soup.recipes.greedy import greedy, members, ranked
from stockpot.soup.recipes.pruned import pruned
from stockpot.soup.score_cache import ScoreCache
from stockpot.soup.souping import cook
from tests.tiny_sweep import PREPROCESS, Ground, finish_trials, tiny_sweep

ORACLES = {"macro_f1": lambda labels, told: f1_score(labels, told, average="macro", zero_division=0), "mcc": matthews_corrcoef}
PAIRS = some.integers(2, 6).flatmap(
    lambda classes: some.lists(some.tuples(*[some.integers(0, classes - 1)] * 2), min_size=1, max_size=40).map(lambda rows: (classes, rows))
)


@pytest.mark.parametrize("metric", ["macro_f1", "mcc"])
@settings(max_examples=40)
@given(drawn=PAIRS)
def test_they_are_scikit_learns(metric: Metric, drawn: tuple[int, list[tuple[int, int]]]) -> None:
    classes, rows = drawn
    labels, told = np.array(rows).T
    found = accuracy(torch.eye(classes)[told], labels, metric)
    assert found.value == found.other == pytest.approx(ORACLES[metric](labels, told), abs=1e-11)
    assert (found.correct, found.seen) == (int((labels == told).sum()), len(rows))
    assert accuracy(torch.eye(classes)[told], labels).other is None


def test_greedy_and_pruned_follow_the_metric_and_not_the_counts() -> None:
    table = {("a",): (8, 0.5), ("b",): (7, 0.6), ("c",): (9, 0.4), ("b", "a"): (6, 0.7), ("b", "a", "c"): (9, 0.7)}
    needs = []

    def score(trials: tuple[str, ...], need: int = 0) -> Verdict:
        needs.append(need)
        correct, other = table[tuple(trials)]
        return Verdict(Accuracy(correct=correct, seen=10, other=other), 10)

    singles = {trial: score((trial,)).accuracy for trial in "abc"}
    assert ranked(singles) == ["b", "a", "c"]
    assert members(greedy(singles, score)) == ("b", "a")
    assert members(greedy(singles, score, "not_worse")) == ("b", "a", "c")
    assert set(needs) == {0}, "nothing may be rejected by a count of right answers"
    assert greedy(singles, score)[-1].lacked is None
    assert pruned(singles, lambda trials: score(trials).accuracy) == ("b", "a")


def test_a_score_of_one_metric_is_no_answer_about_another(tmp_path: Path) -> None:
    plain, other = ScoreCache(tmp_path, "cpu"), ScoreCache(tmp_path, "cpu", "mcc")
    key = other.key(["a"], "split", "held_out", "transform")
    assert key != plain.key(["a"], "split", "held_out", "transform")
    verdict = Verdict(Accuracy(correct=3, seen=4, other=-0.25), 4)
    other.put(key, verdict)
    assert other.get(key, 0) == verdict


@pytest.mark.slow
def test_a_sweep_is_ranked_cooked_and_judged_by_it(ground: Ground, ledger: str, tmp_path: Path) -> None:
    model = f"metric-{uuid4().hex[:8]}"
    sweep = tiny_sweep(ground, model, 3, SoupSpec(metric="macro_f1", compare=("greedy_ensemble",)))
    finish_trials(ground, sweep, tmp_path, noise=0.3)
    report = cook(sweep.id, say=lambda _line: None)
    held_out = {one.trial_id: load_weights(tmp_path / f"trial-{one.index}" / "held_out.safetensors") for one in report.trials}
    f1 = {trial: ORACLES["macro_f1"](stored["labels"], stored["logits"].argmax(1)) for trial, stored in held_out.items()}
    assert {point.trial_id: point.scores.held_out.value for point in report.trials} == pytest.approx(f1)
    assert [step.trial_id for step in report.steps] == sorted(f1, key=lambda trial: (-f1[trial], trial))
    assert all(step.exact for step in report.steps)
    assert report.scores["greedy"].held_out == [step.after for step in report.steps if step.kept][-1]
    stored = load_weights(fetch_file(report.mlflow_run_id, "gate_logits.safetensors", tmp_path))
    assert report.scores["greedy"].gate.value == pytest.approx(ORACLES["macro_f1"](stored["labels"], stored["greedy"].argmax(1)))
    card = tracking.read_text(report.mlflow_run_id, "card.md")
    assert "| macro F1, % |" in card and "Greedy decisions, macro F1 in percent" in card and f"| {100 * max(f1.values()):.2f} |" in card
    assert "Macro f1 in percent" in tracking.read_text(report.mlflow_run_id, "report.html")
    versions = {side: ModelVersion(model=model, version=1, soup_sha256="") for side in ("champion", "challenger")}
    evidence = gather_evidence(sweep, versions, {"champion": tmp_path / "trial-0", "challenger": tmp_path / "trial-1"}, GateSpec())
    decision = judge(evidence)
    gate = pixels(open_snapshot(sweep.data.snapshot), "gate", PREPROCESS)
    for name, side in (("trial-0", decision.gate.champion), ("trial-1", decision.gate.challenger)):
        told = logits(read_model(tmp_path / name), gate.images, PREPROCESS).argmax(1)
        assert side.value == pytest.approx(ORACLES["macro_f1"](gate.labels, told))
    assert decision.gate.gain == decision.gate.challenger.value - decision.gate.champion.value
    assert "95 % interval of the accuracy" in decision.reason
    assert replay(Judgement(decision=decision, evidence=evidence).model_dump_json()).decision == decision
