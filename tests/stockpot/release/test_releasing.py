"""Guards: one soup is one version whatever is run twice or interrupted, the gate follows its rule, and a stranger can load
what was released."""

import json
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from stockpot.config import GateSpec, SoupSpec
from stockpot.errors import RegistryError
from stockpot.ledger import registry, tracking
from stockpot.ledger.connection import client
from stockpot.outcomes import GateDecision, ModelVersion, SoupReport
from stockpot.release import releasing
from stockpot.release.gating import Evidence, judge
from stockpot.soup.souping import cook
from tests.tiny_sweep import Ground, finish_trials, png, tiny_sweep


def cooked(ground: Ground, model: str, folder: Path, trials: int, noise: float = 0.05, recipe: str = "greedy") -> SoupReport:
    sweep = tiny_sweep(ground, model, trials, SoupSpec.model_validate({"recipe": recipe}))
    finish_trials(ground, sweep, folder / f"{trials}", noise)
    return cook(sweep.id, say=[].append)


@pytest.fixture
def model(ledger: str) -> str:
    return f"releasing-{uuid4().hex[:8]}"


def released(report: SoupReport, spec: GateSpec | None = None) -> tuple[ModelVersion, GateDecision]:
    version = releasing.register(report)
    return version, releasing.gate(report, version, spec or GateSpec())


def test_the_first_version_is_champion_and_nothing_is_registered_twice(ground: Ground, model: str, tmp_path: Path) -> None:
    report = cooked(ground, model, tmp_path, 2)
    version, decision = released(report)
    assert (version.version, decision.promoted, decision.champion_before) == (1, True, None)
    assert released(report) == (version.model_copy(update={"alias": "champion"}), decision)
    assert registry.find_version(model, report.soup_sha256) == ModelVersion(
        model=model, version=1, alias="champion", soup_sha256=report.soup_sha256
    )
    assert len(client().search_model_versions(f"name = '{model}'")) == 1
    stored = client().get_model_version(model, "1")
    assert stored.description.startswith(f"# {model}: greedy soup")
    assert stored.tags["stockpot.ingredients"] == ",".join(report.ingredients)


def test_a_better_challenger_takes_over_and_a_worse_one_does_not(ground: Ground, model: str, tmp_path: Path) -> None:
    released(cooked(ground, model, tmp_path, 1, noise=0.6))
    first_report = cooked(ground, model, tmp_path, 3, noise=0.02)
    better, decision = released(first_report, GateSpec(shift_tolerance=1.0))
    assert decision.promoted
    assert decision.gate["challenger"].correct >= decision.gate["champion"].correct
    assert 0 <= (decision.p_value or 0) <= 1
    assert set(decision.shifts) == {"noisy"}
    evidence = Evidence.model_validate_json(tracking.read_report_text(first_report, "gate.json"))
    assert judge(evidence) == decision
    assert registry.alias_version(model, "champion") == better.version
    assert registry.alias_version(model, "previous") == 1
    worse = cooked(ground, model, tmp_path, 2, noise=3.0)
    version, refused = released(worse)
    assert not refused.promoted
    assert "loses" in refused.reason
    assert (registry.alias_version(model, "champion"), registry.alias_version(model, "challenger")) == (better.version, version.version)
    assert releasing.gate(worse, version, GateSpec()) == refused


def test_a_gate_killed_between_decision_and_alias_is_finished_by_the_next(ground: Ground, model: str, tmp_path: Path) -> None:
    report = cooked(ground, model, tmp_path, 1)
    version = releasing.register(report)
    decision = GateDecision(promoted=True, reason="Promoted: the first version of this model.")
    registry.write_tag(version, "stockpot.decision", decision.model_dump_json())
    assert registry.alias_version(model, "champion") is None
    assert releasing.gate(report, version, GateSpec()) == decision
    assert registry.alias_version(model, "champion") == 1


def test_a_version_whose_bytes_changed_gets_no_alias(ground: Ground, model: str, tmp_path: Path) -> None:
    report = cooked(ground, model, tmp_path, 1)
    with pytest.raises(RegistryError, match="sha256"):
        releasing.register(report.model_copy(update={"soup_sha256": "0" * 64}))
    assert registry.alias_version(model, "champion") is None


def test_a_stored_decision_against_a_dethroned_champion_is_taken_again(ground: Ground, model: str, tmp_path: Path) -> None:
    report = cooked(ground, model, tmp_path, 1)
    version = releasing.register(report)
    stale = GateDecision(promoted=False, reason="Stays challenger: stale.", champion_before=41)
    registry.write_tag(version, "stockpot.decision", stale.model_dump_json())
    assert releasing.gate(report, version, GateSpec()).promoted


def test_a_person_can_promote_roll_back_and_roll_forward(ground: Ground, model: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="has no version of"):
        releasing.promote(model)
    released(cooked(ground, model, tmp_path, 1))
    releasing.register(cooked(ground, model, tmp_path, 3, recipe="uniform"))
    registry.set_alias(model, "challenger", 2)
    with pytest.raises(RegistryError, match="has no previous, but versions 1, 2"):
        releasing.rollback(model)
    assert releasing.promote(model).version == 2
    assert (aliases(model), releasing.rollback(model).version) == ({"champion": 2, "challenger": None, "previous": 1}, 1)
    assert (aliases(model), releasing.rollback(model).version) == ({"champion": 1, "challenger": None, "previous": 2}, 2)
    assert [line["after"] for line in registry.read_history(model)] == [1, 2, 1, 2]
    with pytest.raises(RegistryError, match="no version 9"):
        releasing.promote(model, 9)


def aliases(model: str) -> dict[str, int | None]:
    return {alias: registry.alias_version(model, alias) for alias in registry.ALIASES}


STRANGER = """
import json, sys
for name in ("stockpot", "tasks", "flows", "deployments"):
    sys.modules[name] = None
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(model.predict([{"image": open(path, "rb").read()} for path in sys.argv[2:]])))
"""


def test_a_stranger_loads_the_champion_without_pickle_and_gets_the_same_answers(
    ground: Ground, model: str, tmp_path: Path, ledger: str
) -> None:
    released(cooked(ground, model, tmp_path, 2))
    paths = []
    for seed in range(4):
        paths.append(tmp_path / f"{seed}.png")
        paths[-1].write_bytes(png(seed, seed % 3))
    own = registry.load(f"{model}@champion").predict([{"image": path.read_bytes()} for path in paths])
    environ = {"MLFLOW_TRACKING_URI": ledger, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", STRANGER, f"models:/{model}@champion", *map(str, paths)]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == own
