"""Names a person writes down: whether one is an address, and the nearest known ones to a mistyped one, for the end of a sentence."""

import difflib
from collections.abc import Sequence


def is_uri(text: str) -> bool:
    """Whether it is an address of `stockpot.storage` rather than a name."""
    return "://" in text or text.startswith("/")


def nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean ...?` with up to three names like it, or else what is known."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(f'`{match}`' for match in close)}?" if close else f"known are {', '.join(sorted(known)) or 'none'}."
