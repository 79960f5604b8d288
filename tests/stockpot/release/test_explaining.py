"""Guards: a version can be told and rebuilt from the ledger alone, and one changed bit is found."""

from pathlib import Path
from uuid import uuid4

import pytest

from stockpot.config import GateSpec
from stockpot.errors import IngredientMismatch, RegistryError
from stockpot.ledger import registry, tracking
from stockpot.ledger.connection import client
from stockpot.outcomes import SoupReport
from stockpot.release import releasing
from stockpot.release.explaining import explain, reproduce
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
    assert reproduce(f"{model}/1").soup_sha256 == report.soup_sha256

    trial = report.ingredients[0]
    ingredient = tracking.find_ingredient(model, trial)
    assert ingredient is not None
    weights = tmp_path / "model.safetensors"
    data = bytearray((tracking.fetch_ingredient(ingredient, tmp_path / "copy") / "model.safetensors").read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    client().log_model_artifact(ingredient.model_id, str(weights))
    with pytest.raises(IngredientMismatch, match="sha256"):
        reproduce(model)


def test_names_that_lead_nowhere_are_refused(ledger: str) -> None:
    with pytest.raises(RegistryError, match="has no version of nobody"):
        explain("nobody")
    with pytest.raises(RegistryError, match="names no version"):
        registry.resolve("nobody/three")
    with pytest.raises(RegistryError, match="no version 3"):
        reproduce("nobody/3")
