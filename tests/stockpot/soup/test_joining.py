"""Guards: the champion joins the next sweep's pool as one more ingredient, everything about the soup made with it can be told, rebuilt and
kept, and a champion that may not be averaged is left out with the reason."""

from pathlib import Path
from uuid import uuid4

import pytest

from stockpot.config import GateSpec, SoupSpec, Sweep
from stockpot.ledger import registry, tracking
from stockpot.ledger.connection import client
from stockpot.outcomes import ModelVersion, SoupReport
from stockpot.release import releasing
from stockpot.release.explaining import explain, reproduce
from stockpot.release.pruning import plan_removal
from stockpot.settings import TrialSettings
from stockpot.soup.souping import cook
from tests.tiny_sweep import Ground, finish_trials, tiny_sweep

LENIENT = GateSpec(gate_tolerance=1.0, shift_tolerance=1.0)
WITH_CHAMPION = SoupSpec(recipe="uniform", champion=True)


def quiet(line: str) -> None:
    pass


def released(report: SoupReport) -> ModelVersion:
    version = releasing.register(report)
    assert releasing.gate(report, version, LENIENT).promoted
    tracking.close_sweep(report.sweep_id, "FINISHED", {})
    return registry.read_version(report.model, version.version)


@pytest.fixture
def champion(ground: Ground, ledger: str, tmp_path: Path) -> ModelVersion:
    """Last week's soup of two."""
    sweep = tiny_sweep(ground, f"joining-{uuid4().hex[:8]}", 2, SoupSpec(recipe="uniform"), settings=TrialSettings(seed=7))
    finish_trials(ground, sweep, tmp_path / "before", noise=0.02)
    return released(cook(sweep.id, say=quiet))


def this_week(ground: Ground, champion: ModelVersion, folder: Path, trials: int = 2) -> Sweep:
    sweep = tiny_sweep(ground, champion.model, trials, WITH_CHAMPION)
    finish_trials(ground, sweep, folder / "now", noise=0.2)
    return sweep


def test_the_champion_is_one_more_ingredient_told_rebuilt_and_kept(ground: Ground, champion: ModelVersion, tmp_path: Path) -> None:
    before = releasing.read_record(champion, "report.json")
    last_week = SoupReport.model_validate_json(before)
    sweep = this_week(ground, champion, tmp_path)
    report = cook(sweep.id, say=quiet)
    name = champion.ingredient_id
    assert (report.champion, report.origins) == (champion, {name: last_week.sweep_id})
    assert set(report.ingredients) == {trial.id for trial in sweep.trials} | {name}
    (point,) = [point for point in report.trials if point.trial_id == name]
    assert point.scores.held_out == last_week.scores["uniform"].held_out
    assert f"champion that joined: `{name}, version 1`" in tracking.read_text(report.mlflow_run_id, "card.md")
    assert f"{name}, version 1" in tracking.read_text(report.mlflow_run_id, "report.html")
    assert cook(sweep.id, say=quiet) == report

    version = released(report)
    assert version.version == 2
    assert f"{name}, which was version 1" in explain(champion.model)
    client().delete_model_version(champion.model, "1")
    doomed = {one.about for one in plan_removal(champion.model, keep_top=0, min_age_h=0).removable}
    assert champion.soup_sha256 not in doomed, "the second version is made of it"
    assert reproduce(champion.model) == version


def test_a_champion_nothing_improves_on_ships_again_as_the_same_version(ground: Ground, champion: ModelVersion, tmp_path: Path) -> None:
    sweep = tiny_sweep(ground, champion.model, 1, SoupSpec(champion=True))
    finish_trials(ground, sweep, tmp_path / "bad", noise=30.0)
    report = cook(sweep.id, say=quiet)
    assert (report.ingredients, report.soup_sha256) == ((champion.ingredient_id,), champion.soup_sha256)
    assert "No soup improved on the champion, version 1" in tracking.read_text(report.mlflow_run_id, "card.md")
    assert releasing.register(report) == champion


def test_a_champion_that_may_not_be_averaged_is_left_out_with_its_reason(ground: Ground, champion: ModelVersion, tmp_path: Path) -> None:
    sweep = this_week(ground, champion, tmp_path, trials=1)
    tags = registry.read_tags(champion)
    changes = {
        "It started from init ffffffffffff": {"stockpot.init": "f" * 64},
        "It was not made by Stockpot": {"stockpot.init": ""},
        "It is this sweep's own soup": {"stockpot.sweep": sweep.id},
        "It is of sweep gone, which is gone": {"stockpot.sweep": "gone"},
    }
    for told, change in changes.items():
        for tag, value in change.items():
            registry.write_tag(champion, tag, value)
        assert reason(sweep, champion).startswith(f"The champion, version 1: {told}")
        for tag in change:
            registry.write_tag(champion, tag, tags[tag])


def reason(sweep: Sweep, champion: ModelVersion) -> str:
    """Why it is left out; the report is put away, so that the next call cooks again."""
    report = cook(sweep.id, say=quiet)
    assert report.champion is None
    assert report.ingredients == (sweep.trials[0].id,)
    client().update_run(report.mlflow_run_id, "RUNNING")
    return report.excluded[champion.ingredient_id]
