"""Guards: one soup is one version whatever is run twice or interrupted, the gate follows its rule, and a stranger can load
what was released."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier
from uuid import uuid4

import pytest
from mlflow.models import get_model_info

from stockpot.config import GateSpec, SoupSpec
from stockpot.digests import digest
from stockpot.errors import ModelError, RegistryError
from stockpot.ledger import champions, packaging, registry
from stockpot.ledger.connection import client
from stockpot.ledger.limits import DESCRIPTION
from stockpot.ledger.stored import delete_stored
from stockpot.models.classifier import ModelConfig, build
from stockpot.models.folders import write_model
from stockpot.outcomes import GateDecision, ModelVersion, SoupReport
from stockpot.release import crowning, gating, releasing
from stockpot.soup import card
from stockpot.soup.souping import cook
from tests.tiny_sweep import ARCH, CLASSES, PREPROCESS, Ground, finish_trials, png, tiny_sweep
from tests.waiting import PATIENCE_S


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


def test_the_first_version_is_champion_and_nothing_is_registered_twice(
    ground: Ground, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = cooked(ground, model, tmp_path, 2)
    whole = card.write(report) + 200 * "\nand one trial more, as in a long card"
    monkeypatch.setattr(card, "write", lambda report: whole)
    version, decision = released(report)
    assert (version.version, decision.promoted, decision.champion_before) == (1, True, None)
    assert released(report) == (version.model_copy(update={"alias": "champion"}), decision)
    assert registry.find_version(model, report.soup_sha256) == ModelVersion(
        model=model, version=1, alias="champion", soup_sha256=report.soup_sha256
    )
    assert len(client().search_model_versions(f"name = '{model}'")) == 1
    stored = client().get_model_version(model, "1")
    assert stored.description.startswith(f"# {model}: greedy soup")
    assert len(stored.description) <= DESCRIPTION
    assert stored.description.endswith(f"versions/{report.soup_sha256[:12]}/card.md` of MLflow run {report.mlflow_run_id}.")
    assert releasing.read_record(version, "card.md") == whole
    assert stored.tags["stockpot.ingredients"] == ",".join(report.ingredients)
    signature = get_model_info(f"models:/{model}/1").signature
    names = (signature.inputs.input_names(), signature.outputs.input_names(), [one.name for one in signature.params.params])
    assert names == (["image"], ["label", "probability", "top"], ["top_k"])


def test_a_better_challenger_takes_over_and_a_worse_one_does_not(ground: Ground, model: str, tmp_path: Path) -> None:
    released(cooked(ground, model, tmp_path, 1, noise=0.6))
    first_report = cooked(ground, model, tmp_path, 3, noise=0.02)
    better, decision = released(first_report, GateSpec(shift_tolerance=1.0))
    assert decision.promoted
    assert decision.gate is not None
    assert decision.gate.gain >= 0
    assert set(decision.shifts) == {"noisy"}
    assert 0.2 < (decision.latency_ratio or 0) < 5
    assert decision.size_ratio == pytest.approx(1, abs=0.01)
    judgement = releasing.read_judgement(better)
    assert judgement is not None
    assert judgement.decision == decision.model_copy(update={"evidence": "", "evidence_sha256": ""})
    assert len(judgement.evidence.seconds_per_image) == gating.PAIRS
    assert registry.alias_version(model, "champion") == better.version
    assert registry.alias_version(model, "previous") == 1
    worse = cooked(ground, model, tmp_path, 2, noise=3.0)
    version, refused = released(worse)
    assert not refused.promoted
    assert "loses" in refused.reason
    assert (registry.alias_version(model, "champion"), registry.alias_version(model, "challenger")) == (better.version, version.version)
    assert releasing.gate(worse, version, GateSpec()) == refused

    lenient = GateSpec(gate_tolerance=1.0, shift_tolerance=1.0)
    assert releasing.gate(worse, version, lenient).promoted, "another gate judges again"
    assert registry.alias_version(model, "champion") == version.version
    releasing.rollback(model)
    assert releasing.gate(worse, version, lenient).promoted
    assert registry.alias_version(model, "champion") == better.version, "what was carried out once stands, whatever a person did since"

    other = GateSpec(gate_tolerance=0.5)
    assert releasing.gate(first_report, better, other) == decision, "about the champion nothing is left to decide"
    assert registry.read_decision(better) == decision
    assert crowning.settled_under(better) == [decision.gate_digest, digest(other)]
    releasing.promote(model, version.version)
    assert releasing.gate(first_report, better, other) == decision, "and it stands when another is champion"


def test_a_gate_killed_between_decision_and_alias_is_finished_by_the_next(ground: Ground, model: str, tmp_path: Path) -> None:
    report = cooked(ground, model, tmp_path, 1)
    version = releasing.register(report)
    decision = GateDecision(promoted=True, reason="Promoted: there is no champion to compare it with.", gate_digest=digest(GateSpec()))
    registry.write_tag(version, "stockpot.decision", decision.model_dump_json())
    assert registry.alias_version(model, "champion") is None
    assert releasing.gate(report, version, GateSpec()) == decision
    assert registry.alias_version(model, "champion") == 1


def test_a_version_whose_bytes_changed_gets_no_alias(ground: Ground, model: str, tmp_path: Path) -> None:
    report = cooked(ground, model, tmp_path, 1)
    with pytest.raises(RegistryError, match="sha256"):
        releasing.register(report.model_copy(update={"soup_sha256": "0" * 64}))
    assert registry.alias_version(model, "champion") is None


def test_a_version_that_does_not_answer_as_a_service_would_ask_gets_no_alias(
    ground: Ground, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "served_model.py"
    broken.write_text(packaging.SERVED_FILE.read_text().replace("        answers = []\n", '        raise ValueError("no answer")\n', 1))
    monkeypatch.setattr(packaging, "SERVED_FILE", broken)
    with pytest.raises(RegistryError, match=r"does not answer when loaded as a service loads it \(.*no answer\); it gets no alias"):
        released(cooked(ground, model, tmp_path, 1))
    assert registry.alias_version(model, "champion") is None


def test_a_stored_decision_against_a_dethroned_champion_is_taken_again(ground: Ground, model: str, tmp_path: Path) -> None:
    report = cooked(ground, model, tmp_path, 1)
    version = releasing.register(report)
    stale = GateDecision(promoted=False, reason="Stays challenger: stale.", champion_before=41, gate_digest=digest(GateSpec()))
    registry.write_tag(version, "stockpot.decision", stale.model_dump_json())
    assert releasing.gate(report, version, GateSpec()).promoted


@pytest.mark.parametrize(("field", "told"), [("classes", "knows other classes"), ("preprocess", "sees images prepared another way")])
def test_a_champion_of_other_classes_or_another_transform_is_not_compared(
    ground: Ground, model: str, tmp_path: Path, field: str, told: str
) -> None:
    report = cooked(ground, model, tmp_path, 1)
    config = {"classes": ("red", "blue", "green"), "preprocess": PREPROCESS.model_copy(update={"interpolation": "bilinear"})}
    other = ModelConfig(kind="open_clip", arch=ARCH, preprocess=PREPROCESS, classes=CLASSES).model_copy(update={field: config[field]})
    folder = tmp_path / "other"
    sha256 = write_model(folder, build(other))
    model_id = registry.log_soup_model(model, report.mlflow_run_id, sha256, folder)
    rival = registry.register_once(model, model_id, sha256, report.mlflow_run_id, {}, "")
    registry.set_alias(model, "champion", rival.version)
    version, decision = released(report)
    assert not decision.promoted
    assert told in decision.reason
    assert registry.alias_version(model, "champion") == rival.version
    assert releasing.read_judgement(version) is not None
    assert releasing.promote(model).version == version.version


def test_a_champion_that_nobody_can_vouch_for_is_named(ground: Ground, model: str, tmp_path: Path) -> None:
    report = cooked(ground, model, tmp_path, 1)
    folder = tmp_path / "other"
    sha256 = write_model(folder, build(ModelConfig(kind="open_clip", arch=ARCH, preprocess=PREPROCESS, classes=CLASSES)))
    (folder / "fingerprint.json").unlink()
    rival = registry.register_once(
        model, registry.log_soup_model(model, report.mlflow_run_id, sha256, folder), sha256, report.mlflow_run_id, {}, ""
    )
    registry.set_alias(model, "champion", rival.version)
    with pytest.raises(
        ModelError, match=rf"version {rival.version} of {model}: .* no fingerprint.json.*`stockpot promote {model} --version N`"
    ):
        released(report)
    assert registry.alias_version(model, "champion") == rival.version


@pytest.mark.slow
def test_a_champion_that_another_writer_moved_is_not_overwritten(
    ground: Ground, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released(cooked(ground, model, tmp_path, 1))
    better = releasing.register(cooked(ground, model, tmp_path, 3, recipe="uniform"))
    third = releasing.register(cooked(ground, model, tmp_path, 2, recipe="uniform"))
    verified = crowning.verify

    def meanwhile(version: ModelVersion) -> None:
        verified(version)
        registry.set_alias(model, "champion", third.version)

    monkeypatch.setattr(crowning, "verify", meanwhile)
    with pytest.raises(RegistryError, match=f"is version {third.version}, expected was 1: another writer moved it"):
        releasing.promote(model, better.version)
    assert registry.alias_version(model, "champion") == third.version


@pytest.mark.slow
def test_a_version_that_waits_is_challenger_until_a_person_answers(ground: Ground, model: str, tmp_path: Path) -> None:
    spec = GateSpec(approval=True, gate_tolerance=1.0, shift_tolerance=1.0)
    version, decision = released(cooked(ground, model, tmp_path, 1), spec)
    assert (decision.promoted, decision.waits, aliases(model)["champion"]) == (False, True, None)
    assert aliases(model)["challenger"] == version.version
    assert releasing.settle(version, approved=True, note="looks right").alias == "champion"
    assert releasing.settle(version, approved=True).alias == "champion", "the same answer again"
    with pytest.raises(RegistryError, match=f"is champion already, so there is nothing left to decline; `stockpot rollback {model}`"):
        releasing.settle(version, approved=False)
    assert champions.read_history(model)[-1]["why"] == "approved by hand: looks right"
    second, _ = released(cooked(ground, model, tmp_path, 3, recipe="uniform"), spec)
    assert releasing.settle(second, approved=False, note="not today").alias == "challenger"
    assert registry.read_tags(second)["stockpot.approval"] == "declined by hand: not today"
    assert aliases(model) == {"champion": 1, "challenger": 2, "previous": None}
    assert crowning.answer(second) == "declined by hand: not today"
    third, _ = released(cooked(ground, model, tmp_path, 2, recipe="uniform"), GateSpec(gate_tolerance=1.0, shift_tolerance=1.0))
    with pytest.raises(RegistryError, match="does not wait for approval"):
        releasing.settle(third, approved=True)
    with pytest.raises(RegistryError, match="expected was 1: another writer moved it"):
        releasing.settle(second, approved=True)


@pytest.mark.slow
def test_two_at_once_register_one_version_and_move_an_alias_once(
    ground: Ground, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = cooked(ground, model, tmp_path, 2, recipe="uniform")
    find, both = registry.find_version, Barrier(2)

    def find_at_once(*arguments: str) -> ModelVersion | None:
        found = find(*arguments)
        both.wait(PATIENCE_S)
        return found

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(releasing, "alone", lambda _model: nullcontext())  # as on two nodes: no common lock
        patch.setattr(registry, "find_version", find_at_once)
        first, second = pool.map(releasing.register, [report] * 2)
    assert first == second
    assert [int(found.version) for found in client().search_model_versions(f"name = '{model}'")] == [first.version]
    with ThreadPoolExecutor(2) as pool:
        assert [one.promoted for one in pool.map(lambda _: releasing.gate(report, first, GateSpec()), range(2))] == [True, True]
        other = releasing.register(cooked(ground, model, tmp_path, 1))
        assert {one.version for one in pool.map(lambda _: releasing.promote(model, other.version), range(2))} == {other.version}
    assert aliases(model) == {"champion": other.version, "challenger": None, "previous": first.version}
    assert [line["after"] for line in champions.read_history(model)] == [first.version, other.version], "two moves, none twice"


@pytest.mark.slow
def test_a_champion_whose_files_are_gone_is_said_and_can_be_replaced(ground: Ground, model: str, tmp_path: Path) -> None:
    report = cooked(ground, model, tmp_path, 1)
    released(report)
    challenger = cooked(ground, model, tmp_path, 2, recipe="uniform")
    version = releasing.register(challenger)
    delete_stored(report.model_id, "soup")
    told = f"Version 1 of {model} has no files left; .*`stockpot promote {model} --version N`"
    with pytest.raises(RegistryError, match=told):
        releasing.gate(challenger, version, GateSpec())
    with pytest.raises(RegistryError, match=told):
        registry.load(f"{model}@champion")
    assert releasing.promote(model, version.version).alias == "champion"
    with pytest.raises(RegistryError, match=told):
        releasing.rollback(model)


def test_a_person_can_promote_roll_back_and_roll_forward(ground: Ground, model: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="has no version of"):
        releasing.promote(model)
    released(cooked(ground, model, tmp_path, 1))
    releasing.register(cooked(ground, model, tmp_path, 3, recipe="uniform"))
    registry.set_alias(model, "challenger", 2)
    with pytest.raises(RegistryError, match=r"has no previous, but versions 1 \(champion\), 2 \(challenger\); name one, such as"):
        releasing.rollback(model)
    assert releasing.promote(model).version == 2
    assert (aliases(model), releasing.rollback(model).version) == ({"champion": 2, "challenger": None, "previous": 1}, 1)
    assert (aliases(model), releasing.rollback(model).version) == ({"champion": 1, "challenger": None, "previous": 2}, 2)
    assert [line["after"] for line in champions.read_history(model)] == [1, 2, 1, 2]
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
    assert "type hints" not in done.stderr, "MLflow has nothing to warn of"
