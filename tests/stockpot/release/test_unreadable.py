"""Guards: a record of another sweep that this Stockpot cannot read ends no soup and no prune. A soup goes without what it tells of, a prune
keeps whatever it may need, and both name it."""

from pathlib import Path
from uuid import uuid4

import pytest
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from stockpot.config import SoupSpec, Sweep
from stockpot.errors import BadRequest, RecordUnreadable
from stockpot.ledger import tracking
from stockpot.ledger.connection import client
from stockpot.outcomes import Ingredient
from stockpot.release import releasing
from stockpot.release.pruning import plan_removal
from stockpot.settings import TrialSettings
from stockpot.soup.borrowing import require_lenders
from stockpot.soup.souping import cook
from tests.tiny_sweep import Ground, finish_trials, tiny_sweep

MINE, THEIRS = TrialSettings(seed=3), TrialSettings(seed=7)


@pytest.fixture
def model(ledger: str) -> str:
    return f"unreadable-{uuid4().hex[:8]}"


def damage(ingredient: Ingredient) -> None:
    client().set_logged_model_tags(ingredient.model_id, {"stockpot.ingredient": "{}"})


def damage_sweep(sweep: Sweep) -> str:
    """Returns what a person reads of it."""
    run = tracking.open_sweep(sweep)
    client().log_text(run, "{}", "sweep.json")
    return f"First: `sweep.json` of MLflow run {run} is not as this Stockpot writes it"


def lose_sweep(sweep: Sweep) -> None:
    """As when a parent died while it opened it."""
    get_artifact_repository(tracking.sweep_run(sweep.id).info.artifact_uri).delete_artifacts("sweep.json")


def doomed(model: str) -> tuple[list[str], str]:
    plan = plan_removal(model, keep_top=0, min_age_h=0)
    return [one.about for one in plan.removable], plan.unread


def test_an_ingredient_of_another_sweep_that_cannot_be_read_is_no_matter_or_left_out(ground: Ground, model: str, tmp_path: Path) -> None:
    old, new = tiny_sweep(ground, model, 2, settings=THEIRS), tiny_sweep(ground, model, 1, settings=MINE)
    damaged, whole = finish_trials(ground, old, tmp_path / "old")
    own = finish_trials(ground, new, tmp_path / "new")
    damage(damaged)
    assert tracking.find_ingredients(new) == own
    unread: list[RecordUnreadable] = []
    assert tracking.find_earlier(new, 4, unread.append) == [(whole, old.id)]
    assert [damaged.model_id in str(error) for error in unread] == [True]
    with pytest.raises(RecordUnreadable, match=damaged.model_id):  # its own are another matter
        tracking.find_ingredients(old)


def test_prune_keeps_what_a_record_that_cannot_be_read_may_need(ground: Ground, model: str, tmp_path: Path) -> None:
    gone, unreadable = tiny_sweep(ground, model, 1, settings=THEIRS), tiny_sweep(ground, model, 1, settings=MINE)
    (stray,) = finish_trials(ground, gone, tmp_path)
    client().delete_run(tracking.open_sweep(gone))
    assert doomed(model) == ([stray.trial_id], "")
    told = f"1 record that cannot be read. {damage_sweep(unreadable)}"
    kept, why = doomed(model)
    assert (kept, why.startswith(told)) == ([], True)
    client().set_tag(tracking.sweep_run(unreadable.id).info.run_id, "stockpot.init", "f" * 64)
    kept, why = doomed(model)
    assert (kept, why.startswith(told)) == ([stray.trial_id], True), "which started from another init"

    lose_sweep(unreadable)
    kept, why = doomed(model)
    assert (kept, "no `sweep.json` any more" in why) == ([stray.trial_id], True)

    borrower = tiny_sweep(ground, f"{model}-borrower", 1)
    damage_sweep(borrower)
    client().set_tag(tracking.sweep_run(borrower.id).info.run_id, f"stockpot.lender.{model}", "1")
    lose_sweep(borrower)
    kept, why = doomed(model)
    assert (kept, why.startswith("2 records that cannot be read. First: ")) == ([], True), "a body may be borrowed whatever its init"


def test_a_lender_with_nothing_that_can_be_read_is_refused_with_the_reason(ground: Ground, model: str) -> None:
    told = damage_sweep(tiny_sweep(ground, model, 1))
    with pytest.raises(BadRequest, match=f"no finished trial of it; .* Passed over: 1 record that cannot be read. {told}"):
        require_lenders(SoupSpec(bodies_of={model: 1}), ground.init)


@pytest.mark.slow
def test_a_soup_is_cooked_beside_records_that_cannot_be_read(ground: Ground, model: str, tmp_path: Path) -> None:
    old = tiny_sweep(ground, model, 2, settings=THEIRS)
    damaged, whole = finish_trials(ground, old, tmp_path / "old")
    damage(damaged)
    damage_sweep(old)
    lines: list[str] = []
    for borrowed in (0, 4):
        new = tiny_sweep(ground, model, 2, SoupSpec(recipe="uniform", earlier=borrowed), settings=MINE)
        own = finish_trials(ground, new, tmp_path / f"new-{borrowed}") if not borrowed else tracking.find_ingredients(new)
        report = cook(new.id, say=lines.append)
        releasing.register(report)
        tracking.close_sweep(new.id, "FINISHED", {})
        assert set(report.ingredients) == {one.trial_id for one in own}
        told = [line for line in lines if "cannot be read" in line]
        assert [damaged.model_id in line for line in told] == [True] * bool(borrowed)
    assert whole.trial_id in report.excluded, "nobody knows what its sweep was trained on"
    kept, why = doomed(model)
    assert (kept, why.startswith("1 record that cannot be read")) == ([], True)
