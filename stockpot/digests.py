"""Identity by content: sha256 of canonical JSON, of bytes and of files. Ids everywhere in Stockpot are prefixes of these."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

SHORT = 12
"""Hex characters of a digest that make an id: 48 bits, no collision expected below ten million of a kind."""


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes. NaN is refused."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no canonical form")


def digest(value: Any) -> str:
    """The sha256, 64 hex characters, of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def short(value: Any) -> str:
    """The first 12 hex characters of `digest(value)`: an id."""
    return digest(value)[:SHORT]


def text_digest(text: str) -> str:
    """The sha256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes, read once in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
