"""Guards: a sweep is cooked once, from what is fit, and everything about it can be read back from the ledger."""

from pathlib import Path
from uuid import uuid4

import pytest
import torch

from stockpot.checkpoints import load_weights
from stockpot.config import SoupSpec, Sweep
from stockpot.digests import file_digest
from stockpot.errors import SweepMissing, TooFewIngredients
from stockpot.ledger import tracking
from stockpot.ledger.connection import client
from stockpot.outcomes import SoupReport
from stockpot.soup.souping import cook
from tests.tiny_sweep import Ground, finish_trial, finish_trials, tiny_sweep


def quiet(line: str) -> None:
    pass


@pytest.fixture
def sweep(ground: Ground, ledger: str) -> Sweep:
    return tiny_sweep(ground, f"souping-{uuid4().hex[:8]}")


def test_a_sweep_is_cooked_recorded_and_not_cooked_again(ground: Ground, sweep: Sweep, tmp_path: Path) -> None:
    singles = finish_trials(ground, sweep, tmp_path)
    lines: list[str] = []
    report = cook(sweep.id, flow_run_id="flow-7", say=lines.append)
    assert (
        report.scores["greedy"].held_out.correct
        >= report.scores["best_single"].held_out.correct
        == max(one.held_out.correct for one in singles)
    )
    assert report.scores["greedy"].held_out == [step.after for step in report.steps if step.kept][-1]
    assert [step.trial_id for step in report.steps] == sorted((one.trial_id for one in singles), key=rank_of(singles))
    assert set(report.scores["uniform"].shifts) == {"noisy"}
    assert len(report.trials) == 5
    assert tracking.read_report(sweep.id) == report
    assert "flow-7" in client().get_run(report.mlflow_run_id).data.tags.values()
    again: list[str] = []
    assert cook(sweep.id, say=again.append) == report
    assert len(again) == 1


def rank_of(singles: list) -> object:
    held_out = {one.trial_id: one.held_out.correct for one in singles}
    return lambda trial: (-held_out[trial], trial)


def test_the_run_holds_card_picture_gate_logits_and_the_soup(ground: Ground, sweep: Sweep, tmp_path: Path) -> None:
    finish_trials(ground, sweep, tmp_path)
    report = cook(sweep.id, say=quiet)
    assert client().get_run(report.mlflow_run_id).data.tags["mlflow.parentRunId"] == tracking.open_sweep(sweep)
    assert tracking.read_picture(report).startswith(b"\x89PNG")
    assert "## Greedy decisions" in tracking.read_text(report.mlflow_run_id, "card.md")
    assert report.soup_sha256[:12] in tracking.read_text(report.mlflow_run_id, "report.html")
    logits = load_weights(tracking.fetch_report_file(report.mlflow_run_id, "gate_logits.safetensors", tmp_path / "files"))
    assert {name: len(tensor) for name, tensor in logits.items()} == dict.fromkeys(("labels", "best_single", "uniform", "greedy"), 30)
    folder = tmp_path / "model"
    from mlflow.artifacts import download_artifacts

    download_artifacts(artifact_uri=f"models:/{report.model_id}", dst_path=str(folder))
    (weights,) = folder.rglob("model.safetensors")
    assert file_digest(weights) == report.soup_sha256


def test_one_trial_ships_as_a_soup_of_one_and_the_card_says_so(ground: Ground, sweep: Sweep, tmp_path: Path) -> None:
    (only,) = finish_trials(ground, sweep, tmp_path, only=[2])
    report = cook(sweep.id, say=quiet)
    assert (report.ingredients, report.soup_sha256) == ((only.trial_id,), only.weights_sha256)
    assert "the best single model" in tracking.read_text(report.mlflow_run_id, "card.md")


def test_unfit_ingredients_are_left_out_with_their_reason(ground: Ground, sweep: Sweep, tmp_path: Path) -> None:
    good = finish_trials(ground, sweep, tmp_path, only=[0, 1])
    weights = load_weights(tmp_path / "trial-0" / "model.safetensors")
    finish_trial(ground, sweep, 2, tmp_path, state=weights | {"head.bias": torch.full((3,), float("nan"))})
    stranger = finish_trial(ground, sweep, 3, tmp_path)
    client().set_logged_model_tags(
        stranger.model_id, {"stockpot.ingredient": stranger.model_copy(update={"weights_sha256": "0" * 64}).model_dump_json()}
    )
    boasting = finish_trial(ground, sweep, 4, tmp_path)
    better = boasting.held_out.model_copy(update={"correct": boasting.held_out.seen})
    client().set_logged_model_tags(
        boasting.model_id, {"stockpot.ingredient": boasting.model_copy(update={"held_out": better}).model_dump_json()}
    )
    report = cook(sweep.id, say=quiet)
    assert {point.trial_id for point in report.trials} == {one.trial_id for one in good}
    reasons = [report.excluded[sweep.trials[index].id] for index in (2, 3, 4)]
    assert [
        word in reason for word, reason in zip(("`head.bias` holds a NaN", "sha256", "held-out logits give"), reasons, strict=True)
    ] == [True] * 3


def test_a_sweep_without_ingredients_is_refused_with_the_reason(sweep: Sweep) -> None:
    with pytest.raises(TooFewIngredients, match="no trial has finished"):
        cook(sweep.id, say=quiet)


def test_an_unknown_sweep_is_refused(ledger: str) -> None:
    with pytest.raises(SweepMissing):
        cook("unknown", say=quiet)


def test_the_requested_recipe_ships(ground: Ground, ledger: str, tmp_path: Path) -> None:
    sweep = tiny_sweep(ground, f"souping-{uuid4().hex[:8]}", trials=3, soup=SoupSpec(recipe="uniform"))
    finish_trials(ground, sweep, tmp_path)
    report: SoupReport = cook(sweep.id, say=quiet)
    assert sorted(report.ingredients) == sorted(trial.id for trial in sweep.trials)


def test_what_the_request_asks_to_compare_is_shown_and_never_ships(ground: Ground, ledger: str, tmp_path: Path) -> None:
    everything = ("pruned", "model_stock", "ensemble", "greedy_ensemble", "wise_ft", "angles")
    sweep = tiny_sweep(ground, f"souping-{uuid4().hex[:8]}", trials=3, soup=SoupSpec(compare=everything))
    finish_trials(ground, sweep, tmp_path)
    report = cook(sweep.id, say=quiet)
    assert set(report.scores) == {"best_single", "uniform", "greedy", "pruned", "model_stock", "ensemble", "greedy_ensemble"}
    assert report.scores["pruned"].held_out.correct >= report.scores["uniform"].held_out.correct
    assert set(report.alphas) == {"best_single", "uniform", "greedy"}
    for name, points in report.alphas.items():
        assert [point.alpha for point in points] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        assert points[-1].scores == report.scores[name]
        assert points[0].scores == report.alphas["greedy"][0].scores
    assert all(len(row) == 3 for row in report.angles.values())
    assert report.ingredients == tuple(step.trial_id for step in report.steps if step.kept)
