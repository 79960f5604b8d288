"""What the tags of a registered model say of its champions, because MLflow says none of it: the move under way, and the moves so far."""

import json
from datetime import UTC, datetime
from typing import Any

from mlflow.exceptions import RestException

from stockpot.fields import Closed
from stockpot.ledger.connection import asking, client
from stockpot.ledger.limits import MODEL_TAG
from stockpot.ledger.records import parsed


class Move(Closed):
    """One champion after another. Noted before any alias moves, so that whoever comes after an interruption can finish it."""

    before: int | None
    after: int
    why: str


def note_move(model: str, move: Move) -> None:
    """Say which move is under way."""
    with asking():
        client().set_registered_model_tag(model, "stockpot.move", move.model_dump_json())


def read_move(model: str) -> Move | None:
    """The move under way; None when the last one was finished."""
    told = _tags(model).get("stockpot.move")
    return parsed(Move, told, f"The tag `stockpot.move` of {model}") if told else None


def clear_move(model: str) -> None:
    """The move is finished, or given up."""
    with asking():
        client().delete_registered_model_tag(model, "stockpot.move")


def note_change(model: str, before: int | None, after: int, why: str) -> None:
    """Add one line to the history of champions, which keeps the newest that fit a tag. Not twice for one change."""
    history = read_history(model)
    if before == after or (history and history[-1]["after"] == after):
        return
    number = history[-1].get("number", len(history)) + 1 if history else 1
    now = datetime.now(UTC).isoformat(timespec="seconds")
    history.append({"number": number, "when": now, "before": before, "after": after, "why": why[:200]})
    while len(told := json.dumps(history)) > MODEL_TAG:
        history.pop(0)
    with asking():
        client().set_registered_model_tag(model, "stockpot.history", told)


def read_history(model: str) -> list[dict[str, Any]]:
    """The latest changes of champion, oldest first: number (the first ever has 1), when, before, after, why."""
    history: list[dict[str, Any]] = json.loads(_tags(model).get("stockpot.history", "[]"))
    return history


def _tags(model: str) -> dict[str, str]:
    """Empty where there is no such model."""
    with asking():
        try:
            return dict(client().get_registered_model(model).tags)
        except RestException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise
