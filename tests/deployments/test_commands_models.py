"""Promise: a registered version can be told, rebuilt, crowned, rolled back and pruned around from the command line, against a real MLflow
server; and whatever is missing costs one sentence and exit code 1."""

import json
from pathlib import Path
from uuid import uuid4

import pytest

from deployments.tables import sweep_document
from stockpot.config import GateSpec, SoupSpec
from stockpot.ledger import packaging, registry, tracking
from stockpot.ledger.connection import client
from stockpot.outcomes import Scores, SoupReport
from stockpot.release import releasing
from stockpot.release.explaining import read_report
from stockpot.soup.souping import cook
from tasks.planning import finished_trials
from tests.faulty_proxy import faulty_proxy
from tests.tiny_sweep import Ground, finish_trials, tiny_sweep

COMMANDS = ("models", "explain", "reproduce", "promote", "rollback", "prune")


@pytest.fixture(scope="module")
def model(mlflow_server: str, ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with two versions: the greedy soup of a sweep of three is champion, the uniform one challenger."""
    name = f"commands-{uuid4().hex[:8]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("commands-cache")))
        for recipe in ("greedy", "uniform"):
            sweep = tiny_sweep(ground, name, 3, SoupSpec.model_validate({"recipe": recipe}))
            if recipe == "greedy":
                finish_trials(ground, sweep, tmp_path_factory.mktemp("trials"))
            report = cook(sweep.id, say=[].append)
            tracking.close_sweep(sweep.id, "FINISHED", {"finished": 3})
            version = releasing.register(report)
            if recipe == "greedy":
                releasing.gate(report, version, GateSpec())
            else:
                registry.set_alias(name, "challenger", version.version)
    return name


@pytest.fixture
def run(stockpot, ledger: str, monkeypatch: pytest.MonkeyPatch):
    """Standard output of a command that succeeds."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ledger)

    def go(*words: object) -> str:
        code, out, err = stockpot(*words)
        assert (code, err) == (0, ""), (code, err)
        return out

    return go


@pytest.fixture
def refused(stockpot, ledger: str, monkeypatch: pytest.MonkeyPatch):
    """The one sentence of a stated failure."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ledger)

    def go(*words: object) -> str:
        code, out, err = stockpot(*words)
        assert (code, out, len(err.strip().splitlines())) == (1, "", 1), (code, out, err)
        return err

    return go


def report_of(model: str, number: int) -> SoupReport:
    sweep = registry.read_tags(registry.read_version(model, number))["stockpot.sweep"]
    report = tracking.read_report(sweep)
    assert report is not None
    assert report == read_report(registry.read_version(model, number))
    return report


def test_a_version_is_told_and_rebuilt(run, model: str) -> None:
    champion, challenger = report_of(model, 1), report_of(model, 2)
    told = run("explain", model)
    assert f"{model} version 1 is champion." in told
    assert all(trial in told for trial in champion.ingredients)
    assert f"/runs/{champion.mlflow_run_id}/artifacts/report.html\n" in told
    assert f"/runs/{champion.mlflow_run_id}/artifacts/report.html" in run("status", champion.sweep_id)
    assert f"{model} version 2 is challenger." in run("explain", f"{model}@challenger")
    document = json.loads(run("explain", f"{model}/2", "--json"))
    assert document["version"] == {"model": model, "version": 2, "alias": "challenger", "soup_sha256": challenger.soup_sha256}
    assert SoupReport.model_validate(document["report"]) == challenger
    assert document["decision"] is None
    assert f"version 1 is reproduced: {champion.soup_sha256}. The weights were compared to the bit; every file" in run("reproduce", model)
    assert json.loads(run("reproduce", f"{model}@challenger", "--json"))["soup_sha256"] == challenger.soup_sha256


def test_versions_are_listed_with_what_they_scored(run, refused, model: str) -> None:
    champion = report_of(model, 1)
    rows = json.loads(run("models", model, "--json"))
    assert [(row["version"], row["aliases"]) for row in rows] == [(2, ["challenger"]), (1, ["champion"])]
    assert rows[1]["sweep_id"] == champion.sweep_id
    assert Scores.model_validate(rows[1]["scores"]) == champion.scores["greedy"]
    told = run("models")
    assert f"{100 * champion.scores['greedy'].held_out.value:.2f}" in told
    assert f"greedy of {len(champion.ingredients)}" in told
    assert "has no version of nobody" in refused("models", "nobody")
    assert f"{model} has no challnger, but versions 1 (champion), 2 (challenger); write {model}@challenger, if that is meant." in refused(
        "explain", f"{model}@challnger"
    )


def test_a_person_crowns_and_rolls_back(run, model: str) -> None:
    assert f'Version 2 of {model} is champion: mlflow.pyfunc.load_model("models:/{model}@champion")' in run("promote", model)
    assert registry.alias_version(model, "previous") == 1
    assert json.loads(run("rollback", model, "--json"))["version"] == 1
    assert json.loads(run("promote", model, "--version", 2, "--json"))["alias"] == "champion"
    assert "Version 1" in run("rollback", model)
    registry.set_alias(model, "challenger", 2)


def test_pruning_says_what_it_would_free_and_takes_it_only_when_told(run, model: str, ground: Ground, tmp_path: Path) -> None:
    sweep = tiny_sweep(ground, model, 4)
    (stray,) = finish_trials(ground, sweep, tmp_path, noise=2.0, only=[3])
    assert "Would delete 0 of" in run("prune", model, "--keep-top", 0, "--min-age-h", 0), "a sweep that is not cooked keeps everything"
    client().delete_run(tracking.open_sweep(sweep))
    assert "Would delete 0 of" in run("prune", model, "--keep-top", 0), "and what is young stays"
    dry = json.loads(run("prune", model, "--keep-top", 0, "--min-age-h", 0, "--json"))
    assert [(one["kind"], one["about"]) for one in dry["removable"]] == [("ingredient", stray.trial_id)]
    assert (dry["applied"], dry["bytes"], dry["stored"], dry["forgets"]) == (False, dry["removable"][0]["size"], 6, [])
    told = run("prune", model, "--keep-top", 0, "--min-age-h", 0, "--apply")
    assert f"Deleted 1 of {model}'s 6 stored weights and freed {dry['bytes']:,} bytes." in told
    assert [one.trial_id for one in tracking.find_ingredients(sweep)] == [trial.id for trial in sweep.trials[:3]]
    for number in (1, 2):
        registry.fetch_version(registry.read_version(model, number), tmp_path / str(number))


@pytest.mark.slow
def test_pruning_keeps_what_is_needed_and_names_what_it_forgets(run, refused, model: str, ground: Ground, tmp_path: Path) -> None:
    sweep = tiny_sweep(ground, model, 5)
    finish_trials(ground, sweep, tmp_path, noise=2.0, only=(3, 4))
    assert "Would delete 0 of" in run("prune", model, "--keep-top", 0, "--min-age-h", 0), "a sweep that is not cooked keeps everything"
    report = cook(sweep.id, say=[].append)
    tracking.close_sweep(sweep.id, "FINISHED", {"finished": 5})
    assert "Would delete 0 of" in run("prune", model, "--keep-top", 0, "--min-age-h", 0), "so does a soup that is not registered"
    releasing.register(report)
    assert "Would delete 0 of" in run("prune", model, "--keep-top", 0), "and what is young"
    assert "Would delete 0 of" in run("prune", model, "--keep-top", 5, "--min-age-h", 0), "and the best of every sweep"

    borrower = tiny_sweep(ground, model, 1, SoupSpec(earlier=4))
    assert "Would delete 0 of" in run("prune", model, "--keep-top", 0, "--min-age-h", 0), "and what a sweep under way may borrow"
    client().delete_run(tracking.open_sweep(borrower))
    uniform = tiny_sweep(ground, model, 5, SoupSpec(recipe="uniform"))
    mean = cook(uniform.id, say=[].append)
    assert releasing.register(mean).version == 4
    tracking.close_sweep(uniform.id, "FINISHED", {"finished": 5})
    assert f"Rebuild and compare them with `stockpot reproduce {model}/4`" in run("explain", f"{model}/4")

    needed = {trial for number in (1, 2) for trial in report_of(model, number).ingredients}
    dry = json.loads(run("prune", model, "--keep-top", 0, "--min-age-h", 0, "--json"))
    assert {one["about"] for one in dry["removable"]} == {trial.id for trial in sweep.trials} - needed
    assert (dry["applied"], dry["bytes"]) == (False, sum(one["size"] for one in dry["removable"]))
    parts = {3: set(report.ingredients), 4: set(mean.ingredients)}
    assert sorted(dry["forgets"]) == [f"{model}/{number}" for number, made_of in parts.items() if made_of - needed]
    assert f"{model}/4" in dry["forgets"]
    text = run("prune", model, "--keep-top", 0, "--min-age-h", 0)
    assert f"{model}/4 could then no longer be rebuilt from its ingredients; it serves as before." in text
    assert f"Would delete 2 of {model}'s 9 stored weights and free {dry['bytes']:,} bytes; add --apply to do it." in text
    assert f"Deleted 2 of {model}'s 9 stored weights and freed {dry['bytes']:,} bytes." in run(
        "prune", model, "--keep-top", 0, "--min-age-h", 0, "--apply"
    )
    assert tracking.find_ingredients(sweep) == [one for one in tracking.find_ingredients(sweep) if one.trial_id in needed]
    for number in (1, 2, 3):
        registry.fetch_version(registry.read_version(model, number), tmp_path / str(number))
    assert "reproduced" in run("reproduce", model)
    lost = json.loads(run("explain", f"{model}/4", "--json"))["gone"]
    assert {*lost} == {trial.id for trial in sweep.trials} - needed
    for said in (run("explain", f"{model}/4"), refused("reproduce", f"{model}/4")):
        assert f"version 4 can no longer be rebuilt: of its ingredients {', '.join(lost)} are gone from the ledger" in said
    assert "Would delete 0 of" in run("prune", model, "--keep-top", 0, "--min-age-h", 0), "and nothing is forgotten twice"
    assert cook(sweep.id, say=[].append) == report, "a pruned sweep is still a cooked one"
    finished = finished_trials.fn(sweep)
    assert set(finished) == {trial.id for trial in sweep.trials}, "and is not trained again"
    assert sum("pruned since" in told for told in finished.values()) == 2
    rows = sweep_document(sweep.id)["trials"]
    assert sorted(row["state"] for row in rows) == ["finished"] * 3 + ["pruned"] * 2
    assert all(row["held_out"] is not None for row in rows)
    client().delete_model_version(model, str(registry.find_version(model, report.soup_sha256).version))
    assert set(finished_trials.fn(sweep)) == needed, "without the version its ingredients are needed again"


@pytest.mark.slow
def test_a_copied_version_keeps_its_bytes_after_its_original_is_deleted(run, capsys, ground: Ground, ledger: str, tmp_path: Path) -> None:
    model = f"copied-{uuid4().hex[:8]}"
    sweep = tiny_sweep(ground, model, 1)
    finish_trials(ground, sweep, tmp_path)
    report = cook(sweep.id, say=[].append)
    tracking.close_sweep(sweep.id, "FINISHED", {"finished": 1})
    releasing.register(report)
    client().copy_model_version(f"models:/{model}/1", f"{model}-production")
    client().delete_model_version(model, "1")
    capsys.readouterr()  # what MLflow prints about copying
    assert report.model_id in registry.models_behind_versions()
    said = run("prune", model, "--keep-top", 0, "--min-age-h", 0)
    assert "Would delete 0 of" in said
    assert registry.load(f"{model}-production/1") is not None


def test_what_is_missing_is_one_sentence(refused, model: str) -> None:
    for command in ("explain", "reproduce", "promote", "rollback"):
        said = refused(command, "nobody")
        assert "has no version of nobody" in said
        assert "`stockpot soup SWEEP`" in said
    assert "no sweep of nobody" in refused("prune", "nobody")
    assert f"The registry has no version 9 of {model}" in refused("explain", f"{model}/9")
    assert "no version 9" in refused("promote", model, "--version", 9)
    assert "names no version" in refused("reproduce", f"{model}/three")


@pytest.mark.slow
def test_a_download_that_breaks_off_is_one_sentence(
    refused, run, model: str, ledger: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "grey.png").write_bytes(packaging.GREY_PNG)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with faulty_proxy(int(ledger.rpartition(":")[2])) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)
        for name, words in (
            ("report.json", ["explain", model]),
            ("card.md", ["reproduce", model]),
            ("model.safetensors", ["reproduce", model]),
            ("model.safetensors", ["promote", model]),
            ("model.safetensors", ["predict", model, tmp_path / "grey.png"]),
            ("MLmodel", ["predict", model, tmp_path / "grey.png"]),
        ):
            proxy.break_next("cut", 1, after=1500, match=name.encode())
            assert f"{name}` from MLFLOW_TRACKING_URI={proxy.endpoint} broke off" in refused(*words)
            assert proxy.broken == 1
        assert "is reproduced" in run("reproduce", model)


@pytest.mark.slow
def test_a_version_deleted_under_its_alias_is_said_and_mended(refused, run, ground: Ground, tmp_path: Path, ledger: str) -> None:
    model = f"deleted-{uuid4().hex[:8]}"
    sweep = tiny_sweep(ground, model, 1)
    finish_trials(ground, sweep, tmp_path)
    report = cook(sweep.id, say=[].append)
    releasing.gate(report, releasing.register(report), GateSpec())
    assert f"{model} has no challenger, but versions 1" in refused("promote", model)
    assert f"{model} has no previous, but versions 1 (champion); there is no other to take; a retraining" in refused("rollback", model)
    client().delete_model_version(model, "1")
    (tmp_path / "grey.png").write_bytes(packaging.GREY_PNG)
    for command in ("explain", "reproduce", "rollback", "promote"):
        assert f"has no version of {model}" in refused(command, model)
    assert f"has no version of {model}; " in refused("predict", model, tmp_path / "grey.png")
    version = releasing.register(report)
    assert (version.version, releasing.gate(report, version, GateSpec()).promoted) == (2, True)
    assert f"{model} version 2 is champion." in run("explain", model)
    assert "version 1" in refused("promote", model, "--version", 1)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_server_and_help(stockpot, monkeypatch: pytest.MonkeyPatch, closed_port: int, command: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    code, out, err = stockpot(command, "digits")
    assert (code, out) == (1, "")
    assert f"No MLflow server answers at MLFLOW_TRACKING_URI=http://127.0.0.1:{closed_port}" in err
    code, out, _ = stockpot(command, "--help")
    assert code == 0
    assert f"stockpot {command}" in out
    assert "--json" in out
    assert stockpot(command)[0] == (1 if command == "models" else 2), "`models` alone means all of them"
