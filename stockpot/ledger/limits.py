"""How long MLflow lets a text be where its tables lie in PostgreSQL or MySQL (3.17.2); SQLite takes more and says nothing. Tags of a
version and of a LoggedModel have no limit that is ever met.
"""

DESCRIPTION = 5000
"""Characters of a version's description."""

MODEL_TAG = 5000
"""Characters of a registered model's tag."""

RUN_TAG = 8000
"""Characters of a run's tag, and so of the note on its page. MLflow's client cuts a longer one without a word."""


def shortened(text: str, most: int, rest: str) -> str:
    """The text, where it has at most `most` characters; else its first whole lines, and `rest`, which says where all of it is."""
    if len(text) <= most:
        return text
    kept = text[: most - len(rest) - 1]
    return f"{kept[: kept.rfind(chr(10)) + 1]}\n{rest}"
