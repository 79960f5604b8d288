"""Guards: wherever a move of the aliases is interrupted, the same again finishes it, and every champion keeps a name to return by."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient

from stockpot.errors import RegistryError
from stockpot.ledger import champions, registry
from stockpot.ledger.champions import Move
from stockpot.ledger.connection import client
from stockpot.ledger.limits import MODEL_TAG
from stockpot.release import crowning, releasing

WRITES = ("set_registered_model_alias", "delete_registered_model_alias", "set_registered_model_tag", "delete_registered_model_tag")


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
