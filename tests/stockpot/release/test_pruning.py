"""Guards: retention keeps what something needs, each of its rules alone, and names the versions it would make unrebuildable."""

from datetime import datetime, tzinfo
from pathlib import Path
from uuid import uuid4

import pytest

from stockpot.config import SoupSpec
from stockpot.ledger import registry, tracking
from stockpot.ledger.connection import client, experiment
from stockpot.release import pruning
from stockpot.release.pruning import plan_removal, remove
from stockpot.release.releasing import register
from stockpot.soup.souping import cook
from tests.tiny_sweep import Ground, finish_trials, tiny_sweep


@pytest.mark.slow
def test_every_rule_of_retention_keeps_what_it_names(ground: Ground, ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = f"pruning-{uuid4().hex[:8]}"
    sweep = tiny_sweep(ground, model, 5, SoupSpec(recipe="uniform"))
    made = finish_trials(ground, sweep, tmp_path, noise=0.4, only=range(4))
    trials = {one.trial_id for one in made}

    def doomed(keep_top: int = 0, min_age_h: float = 0.0) -> set[str]:
        return {one.about for one in plan_removal(model, keep_top, min_age_h).removable}

    def forgets(min_age_h: float = 0.0) -> tuple[str, ...]:
        return plan_removal(model, keep_top=0, min_age_h=min_age_h).forgets

    first = cook(sweep.id, say=[].append)
    register(first)
    assert doomed() == set(), "a sweep that runs keeps all"
    tracking.close_sweep(sweep.id, "FINISHED", {"finished": 4})
    assert (doomed(), forgets()) == (trials, (f"{model}/1",)), "a version without an alias serves on and can be rebuilt no more"
    plan = plan_removal(model, keep_top=0, min_age_h=0)
    assert [one.size for one in plan.removable] == sorted((one.size for one in plan.removable), reverse=True)
    assert plan.stored == 5, "the soup is kept"
    assert (doomed(min_age_h=24), forgets(min_age_h=24)) == (set(), ())
    best = [one.trial_id for one in sorted(made, key=lambda one: (-one.held_out.correct, one.trial_id))]
    assert [doomed(keep_top=most) for most in (1, 2, 4)] == [{*best[1:]}, {*best[2:]}, set()]
    for alias in ("champion", "previous", "a-persons-own"):
        registry.set_alias(model, alias, 1)
        assert (doomed(), forgets()) == (set(), ()), alias
        registry.set_alias(model, alias, None)

    worst = next(one for one in made if one.trial_id == best[-1])
    tags = {name: told for name, told in client().get_logged_model(worst.model_id).tags.items() if name.startswith("stockpot.")}
    twin = client().create_logged_model(experiment(model), "twin", tags=tags, model_type="stockpot.ingredient")

    class Then(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.fromtimestamp(twin.creation_timestamp / 1000, tz)

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "datetime", Then)
        young = plan_removal(model, keep_top=3, min_age_h=0.001 / 3600)
    assert ([one.model_id for one in young.removable], young.forgets) == ([worst.model_id], ()), "its twin is young, and stays"

    (late,) = finish_trials(ground, sweep, tmp_path, noise=0.4, only=[4])
    assert doomed() == set(), "a sweep with a trial that is not cooked yet keeps all"
    second = cook(sweep.id, say=[].append)
    assert doomed() == set(), "and so does one whose soup is not registered"
    register(second)
    assert doomed() == {*best, late.trial_id}, "and of the soups none, the first version's neither"
    remove(plan_removal(model, keep_top=0, min_age_h=0))
    for number in (1, 2):
        registry.fetch_version(registry.read_version(model, number), tmp_path / str(number))
    unfinished = {name: value for name, value in tags.items() if name != "stockpot.ingredient"}
    client().create_logged_model(experiment(model), "unfinished", tags=unfinished, model_type="stockpot.ingredient")
    assert (doomed(), forgets()) == ({worst.trial_id}, ()), "half an upload is nothing a version could lose"
    client().delete_model_version(model, "1")
    assert doomed() == {worst.trial_id, first.soup_sha256}, "a soup that neither a report nor a version names"
