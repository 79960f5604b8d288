"""What the ledger keeps as JSON, read back, perhaps by a Stockpot whose rules are no longer those of the one that wrote it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from pydantic import ValidationError

from stockpot.errors import RecordUnreadable, RegistryError, StockpotError, counted
from stockpot.fields import Closed

Kind = TypeVar("Kind", bound=Closed)
Given = TypeVar("Given")
Result = TypeVar("Result")
UNREADABLE = (RecordUnreadable, RegistryError)
"""What a record raises that is damaged, another version's, or not there, as that of a sweep whose parent died while it opened it."""
Unread = Callable[[StockpotError], None]
"""Told of a record that cannot be read, and is passed over unless this raises."""


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


def insist(error: StockpotError) -> None:
    """Pass over nothing."""
    raise error


def readable(given: Iterable[Given], read: Callable[[Given], Result], unread: Unread) -> Iterator[tuple[Given, Result]]:
    """Each of them with what `read` makes of it, but for those whose record cannot be read."""
    for one in given:
        try:
            yield one, read(one)
        except UNREADABLE as error:
            unread(error)


def listed(unread: Sequence[StockpotError]) -> str:
    """How many records cannot be read, and the first of them, as it says itself."""
    return f"{counted(len(unread), 'record')} that cannot be read. First: {unread[0]}"
