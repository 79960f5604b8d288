"""Guards: the champion joins the next sweep's pool as one more ingredient, everything about the soup made with it can be told, rebuilt and
kept, and a champion that may not be averaged is left out with the reason."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from stockpot.config import GateSpec, SoupSpec
from stockpot.errors import ServerUnreachable
from stockpot.ledger import registry, tracking
from stockpot.ledger.connection import client
from stockpot.outcomes import ModelVersion, SoupReport
from stockpot.release import releasing
from stockpot.release.explaining import explain, reproduce
from stockpot.release.pruning import plan_removal
from stockpot.settings import TrialSettings
from stockpot.soup.joining import with_champion
from stockpot.soup.kitchen import Kitchen
from stockpot.soup.soupability import gather
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


@pytest.fixture(scope="module")
def champion(mlflow_server: str, ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelVersion]:
    """Last week's soup of two; the tests take it as they find it, and the last one deletes its version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("joining-cache")))
        sweep = tiny_sweep(ground, f"joining-{uuid4().hex[:8]}", 2, SoupSpec(recipe="uniform"), settings=TrialSettings(seed=7))
        finish_trials(ground, sweep, tmp_path_factory.mktemp("before"), noise=0.02)
        yield released(cook(sweep.id, say=quiet))


def test_a_champion_is_scored_here_or_left_out_with_its_reason(ground: Ground, champion: ModelVersion, ledger: str, tmp_path: Path) -> None:
    sweep = tiny_sweep(ground, champion.model, 1, WITH_CHAMPION)
    pool = gather(finish_trials(ground, sweep, tmp_path / "trial", noise=0.2), sweep.init, tmp_path / "pool")
    kitchen, tags = Kitchen(sweep, pool), registry.read_tags(champion)
    unreadable = tiny_sweep(ground, f"unreadable-{uuid4().hex[:8]}", 1)
    client().log_text(tracking.open_sweep(unreadable), "{}", "sweep.json")
    changes = {
        "It started from init ffffffffffff": {"stockpot.init": "f" * 64},
        "It was not made by Stockpot": {"stockpot.init": ""},
        "It is this sweep's own soup": {"stockpot.sweep": sweep.id},
        "It is of sweep gone, which is gone": {"stockpot.sweep": "gone"},
        f"It is of sweep {unreadable.id}. `sweep.json` of MLflow run": {"stockpot.sweep": unreadable.id},
    }
    for told, change in changes.items():
        for tag, value in change.items():
            registry.write_tag(champion, tag, value)
        found = with_champion(pool, kitchen, sweep, tmp_path / "champion")
        assert found.excluded[champion.ingredient_id].startswith(f"The champion, version 1: {told}")
        assert (found.champion, found.candidates) == (None, pool.candidates)
        for tag in change:
            registry.write_tag(champion, tag, tags[tag])
    joined = with_champion(pool, kitchen, sweep, tmp_path / "champion")
    last_week = SoupReport.model_validate_json(releasing.read_record(champion, "report.json"))
    assert (joined.champion, joined.origins, joined.excluded) == (champion, {champion.ingredient_id: last_week.sweep_id}, {})
    found = joined.candidates[champion.ingredient_id].ingredient
    assert (found.held_out, found.weights_sha256) == (last_week.scores["uniform"].held_out, champion.soup_sha256)
    nobody = sweep.model_copy(update={"request": sweep.request.model_copy(update={"model": f"nobody-{uuid4().hex[:8]}"})})
    assert with_champion(pool, kitchen, nobody, tmp_path / "nobody") == pool


def test_a_ledger_that_goes_away_leaves_no_champions_file_open(
    ground: Ground, champion: ModelVersion, ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tiny_sweep(ground, champion.model, 1, WITH_CHAMPION, settings=TrialSettings(seed=8))
    pool = gather(finish_trials(ground, sweep, tmp_path / "trial"), sweep.init, tmp_path / "pool")
    kitchen, find, asked = Kitchen(sweep, pool), registry.find_soup, []

    def away_when_asked_again(*given: str) -> object:
        asked.append(given)
        if len(asked) > 1:
            raise ServerUnreachable("gone")
        return find(*given)

    monkeypatch.setattr(registry, "find_soup", away_when_asked_again)
    with pytest.raises(ServerUnreachable):
        with_champion(pool, kitchen, sweep, tmp_path / "champion")
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert [link for link in links if link.is_relative_to(tmp_path / "champion")] == []
    pool.close()


@pytest.mark.slow
def test_a_champion_nothing_improves_on_ships_again_as_the_same_version(
    ground: Ground, champion: ModelVersion, ledger: str, tmp_path: Path
) -> None:
    sweep = tiny_sweep(ground, champion.model, 1, SoupSpec(champion=True))
    finish_trials(ground, sweep, tmp_path, noise=30.0)
    report = cook(sweep.id, say=quiet)
    assert (report.ingredients, report.soup_sha256) == ((champion.ingredient_id,), champion.soup_sha256)
    assert "No soup improved on the champion, version 1" in tracking.read_text(report.mlflow_run_id, "card.md")
    assert releasing.register(report) == champion


@pytest.mark.slow
def test_the_champion_is_one_more_ingredient_told_rebuilt_and_kept(
    ground: Ground, champion: ModelVersion, ledger: str, tmp_path: Path
) -> None:
    before = releasing.read_record(champion, "report.json")
    last_week = SoupReport.model_validate_json(before)
    sweep = tiny_sweep(ground, champion.model, 2, WITH_CHAMPION)
    finish_trials(ground, sweep, tmp_path, noise=0.2)
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
    assert reproduce(champion.model).version == version
