"""Guards: one soup is one version whatever is run twice or interrupted, the gate follows its rule, and a stranger can load
what was released."""

import json
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from stockpot import registry, releasing
from stockpot.config import GateSpec
from stockpot.errors import RegistryError
from stockpot.ledger import client
from stockpot.outcomes import Accuracy, GateDecision, ModelVersion, SoupReport
from stockpot.souping import cook
from tests.tiny_sweep import Ground, finish_trials, png, tiny_sweep


def cooked(ground: Ground, model: str, folder: Path, trials: int, noise: float = 0.05) -> SoupReport:
    sweep = tiny_sweep(ground, model, trials)
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
    better, decision = released(cooked(ground, model, tmp_path, 3, noise=0.02), GateSpec(shift_tolerance=1.0))
    assert decision.promoted
    assert decision.gate["challenger"].correct >= decision.gate["champion"].correct
    assert 0 <= (decision.p_value or 0) <= 1
    assert set(decision.shifts) == {"noisy"}
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


def score(correct: int) -> Accuracy:
    return Accuracy(correct=correct, seen=200)


@pytest.mark.parametrize(
    ("challenger", "shift", "spec", "promoted", "told"),
    [
        (190, 100, GateSpec(), True, "no loss above"),
        (189, 100, GateSpec(), False, "loses 0.50 points"),
        (188, 100, GateSpec(gate_tolerance=0.01), True, "no loss above"),
        (187, 100, GateSpec(gate_tolerance=0.01), False, "loses 1.50 points, 1.00 are tolerated"),
        (195, 96, GateSpec(shift_tolerance=0.02), True, "no loss above"),
        (195, 95, GateSpec(shift_tolerance=0.02), False, "shift suite blur"),
    ],
)
def test_the_rule(challenger: int, shift: int, spec: GateSpec, promoted: bool, told: str) -> None:
    gate = {"champion": score(190), "challenger": score(challenger)}
    verdict, reason = releasing.judge(gate, {"blur": {"champion": score(100), "challenger": score(shift)}}, 0.5, spec)
    assert verdict is promoted
    assert told in reason


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
