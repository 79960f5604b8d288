"""Guards: a version can be told and rebuilt from the ledger alone, and one changed bit is found."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from stockpot.config import GateSpec, MixingSpec, SoupSpec
from stockpot.errors import IngredientMismatch, ModelError, RegistryError
from stockpot.ledger import registry, tracking
from stockpot.ledger.connection import client
from stockpot.outcomes import SoupReport
from stockpot.release import explaining, releasing
from stockpot.release.explaining import explain, read_report, reproduce
from stockpot.soup.souping import cook
from tests.tiny_sweep import Ground, finish_trials, tiny_sweep


@pytest.fixture
def report(ground: Ground, ledger: str, tmp_path: Path) -> SoupReport:
    """A released soup of a sweep of four."""
    sweep = tiny_sweep(ground, f"explaining-{uuid4().hex[:8]}", 4)
    finish_trials(ground, sweep, tmp_path)
    report = cook(sweep.id, say=[].append)
    releasing.gate(report, releasing.register(report), GateSpec())
    tracking.close_sweep(sweep.id, "FINISHED", {"finished": 4})
    return report


def test_a_version_is_told_rebuilt_and_found_changed(report: SoupReport, ground: Ground, tmp_path: Path) -> None:
    model = report.model
    told = explain(model)
    assert f"{model} version 1 is champion." in told
    assert all(trial in told for trial in report.ingredients)
    assert "Gate: Promoted: there is no champion" in told
    version, how = reproduce(f"{model}/1")
    assert (version, version.soup_sha256) == (registry.read_version(model, 1), report.soup_sha256)
    assert "report, card and gate evidence, by the sha256" in how
    ingredient = tracking.find_ingredient(model, report.ingredients[0])
    assert ingredient is not None
    soup, trial = tmp_path / "soup", tmp_path / "trial"
    registry.fetch_version(version, soup)
    tracking.fetch_ingredient(ingredient, trial)
    decision = registry.read_decision(version)
    assert decision is not None
    evidence = decision.evidence.partition(f"{report.mlflow_run_id}/")[2]
    record = f"versions/{report.soup_sha256[:12]}"
    places = {
        "weights with sha256": lambda: model_file(report.model_id, soup, "artifacts/soup/model.safetensors"),
        "artifacts/soup/model.json": lambda: model_file(report.model_id, soup, "artifacts/soup/model.json"),
        "served_model.py": lambda: model_file(report.model_id, soup, "served_model.py"),
        "its weights have sha256": lambda: model_file(ingredient.model_id, trial, "model.safetensors"),
        "card.json has another": lambda: model_file(ingredient.model_id, trial, "card.json"),
        "held_out.safetensors has another": lambda: model_file(ingredient.model_id, trial, "held_out.safetensors"),
        "`report.json` of": lambda: run_file(report.mlflow_run_id, f"{record}/report.json"),
        "`card.md` of": lambda: run_file(report.mlflow_run_id, f"{record}/card.md"),
        "The gate's evidence": lambda: run_file(report.mlflow_run_id, evidence),
    }
    for told, flip in places.items():
        mend = flip()
        with pytest.raises((RegistryError, IngredientMismatch), match=told):
            reproduce(model)
        mend()
    assert reproduce(model).version.version == 1

    registry.write_tag(version, "stockpot.decision", decision.model_copy(update={"reason": "Promoted: it is the best."}).model_dump_json())
    for command in (explain, reproduce):
        with pytest.raises(RegistryError, match=r"Promoted: it is the best\.\) is not what follows .* \(Promoted: there is no"):
            command(model)


@pytest.mark.slow
def test_one_bit_anywhere_in_any_stored_file_is_found(report: SoupReport, tmp_path: Path) -> None:
    version = registry.read_version(report.model, 1)
    registry.fetch_version(version, tmp_path / "soup")
    stored = [(report.model_id, tmp_path / "soup")]
    for trial in report.ingredients:
        ingredient = tracking.find_ingredient(report.model, trial)
        assert ingredient is not None
        stored.append((ingredient.model_id, tracking.fetch_ingredient(ingredient, tmp_path / trial)))
    flips = [
        (f"{folder.name}/{path.relative_to(folder)}", partial(model_file, model_id, folder, str(path.relative_to(folder))))
        for model_id, folder in stored
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "registered_model_meta"  # MLflow writes it where it downloads to
    ]
    record = [info.path for info in client().list_artifacts(report.mlflow_run_id, f"versions/{report.soup_sha256[:12]}")]
    flips += [(name, partial(run_file, report.mlflow_run_id, name)) for name in record]
    assert {Path(name).name for name, _ in flips} >= {
        "MLmodel", "served_model.py", "requirements.txt", "model.safetensors", "model.json", "fingerprint.json", "recipe.json",
        "held_out.safetensors", "card.json", "card.md", "report.json",
    }  # fmt: skip
    assert any("/gate-against-" in name for name, _ in flips)
    unnoticed = []
    for name, flip in flips:
        mend = flip()
        try:
            reproduce(report.model)
        except (RegistryError, IngredientMismatch):
            pass
        else:
            unnoticed.append(name)
        mend()
    assert unnoticed == []
    assert reproduce(report.model).version == version


Mend = Callable[[], None]


def model_file(model_id: str, folder: Path, name: str) -> Mend:
    """Flip one bit of a stored model's file; returns what puts it back."""

    def store(data: bytes) -> None:
        (folder / name).write_bytes(data)
        get_artifact_repository(client().get_logged_model(model_id).artifact_location).log_artifact(
            str(folder / name), str(Path(name).parent) if "/" in name else None
        )

    data = (folder / name).read_bytes()
    store(flipped(data))
    return lambda: store(data)


def run_file(mlflow_run_id: str, name: str) -> Mend:
    """The same for a text file of a run."""
    text = tracking.read_text(mlflow_run_id, name)
    tracking.store_text(mlflow_run_id, name, flipped(text.encode()).decode())
    return lambda: tracking.store_text(mlflow_run_id, name, text)


def flipped(data: bytes) -> bytes:
    """The lowest bit of the byte in the middle."""
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    return bytes(changed)


@pytest.mark.slow
def test_a_version_keeps_its_own_record_when_its_sweep_is_cooked_again(ground: Ground, ledger: str, tmp_path: Path) -> None:
    sweep = tiny_sweep(ground, f"explaining-{uuid4().hex[:8]}", 3, SoupSpec(recipe="uniform"))
    versions = []
    for only in ((0,), (1, 2)):
        finish_trials(ground, sweep, tmp_path, only=only)
        report = cook(sweep.id, say=[].append)
        versions.append((releasing.register(report), report))
    assert [version.version for version, _ in versions] == [1, 2]
    assert [read_report(version) for version, _ in versions] == [report for _, report in versions]
    for made, _ in versions:
        version, how = reproduce(f"{sweep.request.model}/{made.version}")
        assert version.version == made.version
        assert ", and its report and card, by the sha256" in how  # never judged


@pytest.mark.slow
def test_every_recipe_is_rebuilt_from_its_record_and_a_flipped_bit_found(
    ground: Ground, ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mixing = f"explaining-{uuid4().hex[:8]}", MixingSpec(ingredients=2, batch_size=16, epochs=2)
    trained = tiny_sweep(ground, model, 3)
    finish_trials(ground, trained, tmp_path)
    for recipe in ("pruned", "learned", "learned_by_layer", "model_stock", "wise_ft"):
        sweep = tiny_sweep(ground, model, 3, SoupSpec.model_validate({"recipe": recipe, "mixing": mixing, "alpha": 0.7}))
        report = cook(sweep.id, say=[].append)
        version = releasing.register(report)
        assert (report.recipe, recipe in report.scores) == (recipe, True)
        assert reproduce(f"{model}/{version.version}").version.soup_sha256 == report.soup_sha256
        ingredient = tracking.find_ingredient(model, report.ingredients[-1])
        assert ingredient is not None
        trial = tmp_path / recipe
        tracking.fetch_ingredient(ingredient, trial)
        mend = model_file(ingredient.model_id, trial, "model.safetensors")
        with pytest.raises(IngredientMismatch, match="its weights have sha256"):
            reproduce(f"{model}/{version.version}")
        mend()
    share = report.model_copy(update={"alpha": 0.70001})
    older = share.model_copy(update={"versions": {}})
    for changed, why in ((share, "the record and the weights disagree"), (older, "averaged another way")):
        with monkeypatch.context() as patch:
            patch.setattr(explaining, "read_report", lambda _, changed=changed: changed)
            with pytest.raises(RegistryError, match=f"give another sha256 than was registered; .*{why}"):
                reproduce(f"{model}/{version.version}")
    weights = Path(ground.init.uri) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(flipped(whole))
    try:
        with pytest.raises(ModelError, match="The init at"):
            reproduce(f"{model}/{version.version}")
    finally:
        weights.write_bytes(whole)


def test_names_that_lead_nowhere_are_refused(ledger: str) -> None:
    with pytest.raises(RegistryError, match="has no version of nobody"):
        explain("nobody")
    with pytest.raises(RegistryError, match="names no version"):
        registry.resolve("nobody/three")
    with pytest.raises(RegistryError, match="no version 3"):
        reproduce("nobody/3")
