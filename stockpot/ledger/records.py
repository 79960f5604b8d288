"""What the ledger keeps as JSON, read back, perhaps by a Stockpot whose rules are no longer those of the one that wrote it."""

from typing import TypeVar

from pydantic import ValidationError

from stockpot.errors import RecordUnreadable
from stockpot.fields import Closed

Kind = TypeVar("Kind", bound=Closed)


def parsed(kind: type[Kind], text: str | bytes, what: str) -> Kind:
    """The record. what: its name, as a sentence begins. Raises `RecordUnreadable`."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "JSON"
        raise RecordUnreadable(
            f"{what} is not as this Stockpot writes it (`{place}`: {first['msg']}); read it with the one that wrote it, or delete it and "
            "make it anew."
        ) from error
