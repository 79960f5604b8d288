"""Retention: which stored weights nothing needs any more. `mlflow gc` alone would also delete the bytes under a registered version.

Kept: the soups of every registered version; the ingredients of champion, challenger and previous; the best `keep_top` trials of every
sweep; every ingredient of a sweep that is running or not cooked yet. Inits lie in object storage and are never touched. The rest are
ingredients a later run of the same request would have to train again, and soups that were cooked but never registered.
"""

from stockpot.config import Closed
from stockpot.ledger import registry, tracking
from stockpot.outcomes import ModelVersion


class Removable(Closed):
    """One LoggedModel nothing needs."""

    model_id: str
    kind: str
    """`ingredient` or `soup`."""
    about: str
    """Trial id, or the start of the soup's sha256."""
    size: int
    """Bytes."""


def find_removable(model: str, keep_top: int = 8) -> list[Removable]:
    """What `remove` would delete, largest first. Reads only."""
    needed = _needed_trials(model, keep_top)
    sources = registry.version_sources(model)
    found = [
        Removable(model_id=one.model_id, kind=one.kind, about=one.about, size=tracking.stored_bytes(one.model_id))
        for one in tracking.stored_models(model)
        if (one.about not in needed if one.kind == "ingredient" else one.model_id not in sources)
    ]
    return sorted(found, key=lambda one: -one.size)


def remove(removable: list[Removable]) -> int:
    """Delete them, record and bytes; returns the bytes freed."""
    for one in removable:
        tracking.delete_stored(one.model_id)
    return sum(one.size for one in removable)


def _needed_trials(model: str, keep_top: int) -> set[str]:
    needed: set[str] = set()
    for summary in tracking.list_sweeps(model):
        sweep = tracking.read_sweep(summary.sweep_id)
        if summary.status == "RUNNING" or tracking.read_report(summary.sweep_id) is None:
            needed |= {trial.id for trial in sweep.trials}
        best = sorted(tracking.find_ingredients(sweep), key=lambda one: (-one.held_out.correct, one.trial_id))
        needed |= {one.trial_id for one in best[:keep_top]}
    for alias in registry.ALIASES:
        if (number := registry.alias_version(model, alias)) is not None:
            needed |= _ingredients(registry.read_version(model, number))
    return needed


def _ingredients(version: ModelVersion) -> set[str]:
    return set(registry.read_tags(version).get("stockpot.ingredients", "").split(","))
