"""Guards: wherever a move of the aliases is interrupted, the same again finishes it, and every champion keeps a name to return by."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient

from stockpot.config import GateSpec
from stockpot.digests import digest
from stockpot.errors import RegistryError
from stockpot.ledger import champions, registry
from stockpot.ledger.champions import Move
from stockpot.ledger.connection import client
from stockpot.ledger.limits import MODEL_TAG
from stockpot.outcomes import GateDecision, SoupReport
from stockpot.release import crowning, releasing

WRITES = ("set_registered_model_alias", "delete_registered_model_alias", "set_registered_model_tag", "delete_registered_model_tag",
          "set_model_version_tag")  # fmt: skip


class Killed(BaseException):
    """What a SIGKILL is to the code: nothing after it runs."""


@pytest.fixture
def model(ledger: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Three versions without files: 1 was champion before 2, and 3 challenges."""
    name = f"crowning-{uuid4().hex[:8]}"
    monkeypatch.setattr(crowning, "verify", lambda version: None)
    client().create_registered_model(name)
    for number in (1, 2, 3):
        client().create_model_version(name, f"s3://nowhere/{number}")
    set_aliases(name, champion=2, previous=1, challenger=3)
    return name


def set_aliases(model: str, **wanted: int | None) -> None:
    for alias, number in wanted.items():
        registry.set_alias(model, alias, number)


def killed_before(number: int, patch: pytest.MonkeyPatch, action: Callable[[], Any]) -> bool:
    """Whether the action was killed before its `number`-th write to the registry; it made fewer otherwise."""
    made = 0

    def deadly(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal made
            made += 1
            if made == number:
                raise Killed
            return write(*arguments, **named)

        return call

    with patch.context() as during:
        for name in WRITES:
            during.setattr(MlflowClient, name, deadly(getattr(MlflowClient, name)))
        try:
            action()
        except Killed:
            return True
    return False


@pytest.mark.parametrize(
    ("action", "writes", "after", "lines"),
    [
        (releasing.rollback, 5, {"champion": 1, "previous": 2, "challenger": 3}, [1]),
        pytest.param(releasing.promote, 6, {"champion": 3, "previous": 2}, [3], marks=pytest.mark.slow),
    ],
)
def test_a_move_killed_before_any_write_is_finished_by_the_same_again(
    model: str, monkeypatch: pytest.MonkeyPatch, action: Callable[[str], Any], writes: int, after: dict[str, int], lines: list[int]
) -> None:
    for number in range(1, writes + 1):
        assert killed_before(number, monkeypatch, lambda: action(model)), f"write {number}"
        named = set(registry.aliases(model).values())
        noted = champions.read_move(model)
        assert {2, after["champion"]} <= named | ({noted.before, noted.after} if noted else set()), "both can be found"
        assert action(model).version == after["champion"]
        assert (registry.aliases(model), champions.read_move(model)) == (after, None)
        assert [line["after"] for line in champions.read_history(model)] == lines
        set_aliases(model, champion=2, previous=1, challenger=3)
        client().delete_registered_model_tag(model, "stockpot.history")
    assert not killed_before(writes + 1, monkeypatch, lambda: action(model)), "no write was left out"


REPORT = SoupReport.model_construct()
"""What `gate` is given where it has nothing to measure."""


def judged(monkeypatch: pytest.MonkeyPatch, *, waits: bool = False) -> list[int | None]:
    """Every version passes from now on; returns the champions it was judged against, as they come."""
    against: list[int | None] = []

    def decide(_report: Any, _version: Any, champion: int | None, spec: GateSpec) -> GateDecision:
        against.append(champion)
        told = f"Passed against {champion}."
        return GateDecision(promoted=not waits, waits=waits, reason=told, gate_digest=digest(spec), champion_before=champion)

    monkeypatch.setattr(releasing, "_decide", decide)
    return against


@pytest.mark.parametrize("number", [3, *[pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 4, 5, 6, 7, 8)]])
def test_a_gate_killed_before_any_write_promotes_once_and_never_behind_a_persons_back(
    model: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    against = judged(monkeypatch)
    version = registry.read_version(model, 3)

    def gate() -> GateDecision:
        return releasing.gate(REPORT, version, GateSpec())

    assert killed_before(number, monkeypatch, gate)
    moved = number > 2  # decision, then the note of the move
    assert releasing.rollback(model).version == (2 if moved else 1)
    assert gate().promoted
    assert registry.alias_version(model, "champion") == (2 if moved else 3)
    assert against == ([2] if moved else [2, 1]), "and only against another champion it is judged again"


def test_what_an_earlier_stockpot_carried_out_is_not_carried_out_again(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch)
    version, asked = registry.read_version(model, 3), digest(GateSpec())
    done = GateDecision(promoted=True, reason="Promoted.", gate_digest=asked, champion_before=2)
    registry.write_tag(version, "stockpot.decision", done.model_dump_json())
    registry.write_tag(version, "stockpot.settled", asked)  # as it was written before decisions had a name there
    assert releasing.gate(REPORT, version, GateSpec()) == done
    assert registry.alias_version(model, "champion") == 2, "a person had taken it back"
    registry.write_tag(version, "stockpot.settled", digest(GateSpec(gate_tolerance=0.5)))
    releasing.gate(REPORT, version, GateSpec())
    assert registry.alias_version(model, "champion") == 3, "what was settled is another decision, and this one is still to be carried out"


@pytest.mark.slow
def test_a_gate_and_an_approval_write_eight_times(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch)
    version = registry.read_version(model, 3)
    assert not killed_before(9, monkeypatch, lambda: releasing.gate(REPORT, version, GateSpec())), "no write was left out"
    assert registry.aliases(model) == {"champion": 3, "previous": 2}
    reset(model)
    judged(monkeypatch, waits=True)
    releasing.gate(REPORT, version, GateSpec())
    assert not killed_before(9, monkeypatch, lambda: releasing.settle(version, approved=True)), "no write was left out"


@pytest.mark.slow
def test_a_decision_left_undone_is_settled_by_whoever_makes_the_version_champion(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch)
    version = registry.read_version(model, 3)
    assert killed_before(2, monkeypatch, lambda: releasing.gate(REPORT, version, GateSpec())), "decided, nothing moved"
    releasing.promote(model, 3)
    releasing.rollback(model)
    assert releasing.gate(REPORT, version, GateSpec()).promoted
    assert registry.alias_version(model, "champion") == 2, "a person had taken it back"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 9))
def test_an_approval_killed_before_any_write_promotes_once(model: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, waits=True)
    version = registry.read_version(model, 3)
    releasing.gate(REPORT, version, GateSpec())

    def approve() -> Any:
        return releasing.settle(version, approved=True)

    assert killed_before(number, monkeypatch, approve)
    moved = number > 1
    if moved:
        assert releasing.rollback(model).version == 2
    approve()
    assert registry.alias_version(model, "champion") == (2 if moved else 3)
    assert crowning.answer(version) == "approved by hand"


def reset(model: str) -> None:
    """As the fixture left it."""
    set_aliases(model, champion=2, previous=1, challenger=3)
    client().delete_registered_model_tag(model, "stockpot.history")
    for name in registry.read_tags(registry.read_version(model, 3)):
        client().delete_model_version_tag(model, "3", name)


def test_another_command_finishes_the_interrupted_move_before_its_own(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert killed_before(3, monkeypatch, lambda: releasing.promote(model, 3)), "3 is champion, 2 is not yet previous"
    assert releasing.rollback(model).version == 2
    assert registry.aliases(model) == {"champion": 2, "previous": 3}


def test_a_noted_move_that_cannot_be_finished_is_struck_out(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    champions.note_move(model, Move(before=1, after=3, why="promoted by hand"))
    assert releasing.rollback(model).version == 1, "a person had moved the champion on to 2"
    champions.note_move(model, Move(before=1, after=9, why="promoted by hand"))
    with pytest.raises(RegistryError, match="no version 9"):
        releasing.promote(model, 3)
    assert releasing.promote(model, 3).alias == "champion"


def test_a_champion_moved_on_another_node_during_the_move_is_noticed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = champions.note_change

    def meanwhile(*arguments: Any) -> None:
        changed(*arguments)
        client().set_registered_model_alias(model, "champion", "1")

    monkeypatch.setattr(champions, "note_change", meanwhile)
    with pytest.raises(RegistryError, match="is version 1, expected was 3: another writer moved it"):
        releasing.promote(model, 3)


def test_the_history_keeps_the_newest_lines_that_a_tag_holds_and_counts_on(model: str) -> None:
    for number in range(1, 22):
        champions.note_change(model, number - 1, number, f'"{number}" ' + "why " * 100)
    told = client().get_registered_model(model).tags["stockpot.history"]
    history = champions.read_history(model)
    assert len(told) <= MODEL_TAG < len(told) + 400, "as many as fit"
    assert [line["number"] for line in history] == list(range(22 - len(history), 22))
    assert history[-1]["after"] == 21
