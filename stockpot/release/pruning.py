"""Retention: which stored weights nothing needs any more. `mlflow gc` alone would also delete the bytes under a registered version.

Kept, whatever else: the soup of every registered version, under any model's name; the ingredients of every version with an alias
(champion, challenger, previous, and a person's own), also an earlier champion among them, and what other models' such versions borrowed;
the best `keep_top` trials of every sweep; every trial of a sweep that runs, waits to be cooked or registered, or is being cooked, what it
may borrow from earlier sweeps and other models, and its soup; what a sweep with a record that cannot be read may need, which is whatever
started from its init, and every soup that no version has; everything younger than `min_age_h`. Inits lie in object storage and are never
touched. The rest are ingredients of versions without an alias, which then serve as before and can no longer be rebuilt, ingredients
in no version, and soups that no report names any more.
"""

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import NamedTuple

from stockpot.config import Sweep
from stockpot.errors import StockpotError, SweepMissing
from stockpot.fields import Closed
from stockpot.ledger import registry, stored, tracking
from stockpot.ledger.lending import find_borrowers, find_loans
from stockpot.ledger.records import UNREADABLE, listed, readable
from stockpot.ledger.stored import Kind, Stored
from stockpot.outcomes import Accuracy, SweepSummary


class Removable(Closed):
    """One LoggedModel nothing needs."""

    model_id: str
    kind: Kind
    about: str
    """Trial id, or the soup's sha256."""
    size: int
    """Bytes."""


class Doubt(NamedTuple):
    """A record that cannot be read, so nobody knows what it needs."""

    error: StockpotError
    init: str
    """Of the sweep it is of, from which all that it may need started; empty for any."""

    def covers(self, one: Stored) -> bool:
        """Whether it may need this."""
        return "" in (self.init, one.init) or self.init == one.init


class Plan(Closed):
    """What `remove` would delete, largest first, out of how many stored models."""

    removable: tuple[Removable, ...]
    stored: int
    forgets: tuple[str, ...] = ()
    """Versions that lose an ingredient, of other models too, as `explain` takes them: `digits/3`. They could not be rebuilt any more."""
    unread: str = ""
    """What records cannot be read, whose needs are kept whatever they are."""

    @property
    def size(self) -> int:
        """Bytes it frees."""
        return sum(one.size for one in self.removable)


def plan_removal(model: str, keep_top: int = 8, min_age_h: float = 24.0) -> Plan:
    """What nothing needs. Reads only. Raises `SweepMissing` for a model without sweeps, `ServerUnreachable`."""
    everything = stored.stored_models(model)  # before the sweeps are read: what begins after this line is not in it
    trials, soups, doubts = _needed(model, keep_top)
    versions = registry.list_versions()  # of other models too: they may have borrowed; and after the sweeps, to miss none of their soups
    trials |= {name for version in versions if version.aliases for name in version.ingredients}
    youngest = datetime.now(UTC) - timedelta(hours=min_age_h)
    spare = [one for one in everything if one.made <= youngest and one.ingredient_id not in trials and one.model_id not in soups]
    found = [one for one in spare if not any(doubt.covers(one) for doubt in doubts)]
    gone = {one.ingredient_id for one in found if one.whole} - {one.ingredient_id for one in {*everything} - {*found} if one.whole}
    removable = [Removable(model_id=one.model_id, kind=one.kind, about=one.about, size=stored.stored_bytes(one.model_id)) for one in found]
    return Plan(
        removable=tuple(sorted(removable, key=lambda one: -one.size)),
        stored=len(everything),
        forgets=tuple(f"{version.model}/{version.version}" for version in versions if gone & {*version.ingredients}),
        unread=listed([doubt.error for doubt in doubts]) if doubts else "",
    )


def remove(plan: Plan) -> None:
    """Delete what the plan names, records and bytes. Interrupted, it is finished by the next one."""
    for one in plan.removable:
        stored.delete_stored(one.model_id, one.kind)


def no_longer_needed(sweep: Sweep) -> dict[str, Accuracy | None]:
    """Trials whose ingredients may be missing because the sweep's soup is a registered version already, with what they scored on held_out
    (None where they were left out of the soup as unfit). Trained again they would change nothing."""
    report = tracking.read_report(sweep.id)
    if report is None or registry.find_version(report.model, report.soup_sha256) is None:
        return {}
    cooked = dict.fromkeys(report.excluded) | {point.trial_id: point.scores.held_out for point in report.trials}
    return {trial.id: cooked[trial.id] for trial in sweep.trials if trial.id in cooked}


def _needed(model: str, keep_top: int) -> tuple[set[str], set[str], list[Doubt]]:
    """Ids of ingredients, LoggedModels of soups, and what else may be needed."""
    trials, soups, doubts = set[str](), registry.models_behind_versions(), list[Doubt]()
    sweeps = tracking.list_sweeps(model)
    if not sweeps:
        raise SweepMissing(f"The ledger has no sweep of {model}, so nothing of it is stored; `stockpot status` lists the sweeps it has.")
    for summary in sweeps:
        try:
            needed, soup = _needed_by(summary, keep_top)
        except UNREADABLE as error:
            doubts.append(Doubt(error, summary.init))
        else:
            trials |= needed
            soups |= soup

    def unread(error: StockpotError) -> None:
        doubts.append(Doubt(error, ""))  # of a sweep of another model, which may borrow of any init

    for _, lent in readable(find_borrowers(model, unread), partial(_lendable, model), unread):
        trials |= lent
    return trials, soups, doubts


def _needed_by(summary: SweepSummary, keep_top: int) -> tuple[set[str], set[str]]:
    """Ids of ingredients that a sweep needs, and the LoggedModel of its soup."""
    sweep, report = tracking.sweep_on(summary.mlflow_run_id), tracking.read_report(summary.sweep_id)
    finished = tracking.find_ingredients(sweep)
    best = sorted(finished, key=lambda one: (-one.held_out.correct, one.trial_id))
    trials = {one.trial_id for one in best[:keep_top]}
    cooked = set() if report is None else {point.trial_id for point in report.trials} | set(report.excluded)
    registered = report is not None and registry.find_version(summary.model, report.soup_sha256) is not None
    if summary.status == "RUNNING" or not registered or not {one.trial_id for one in finished} <= cooked:
        trials |= {name for trial in sweep.trials for name in trial.ingredient_ids} | set(report.ingredients if report else ())
        trials |= {one.trial_id for one, _ in tracking.find_earlier(sweep, sweep.request.soup.earlier)}
    return trials, set() if report is None else {report.model_id}


def _lendable(model: str, sweep: Sweep) -> set[str]:
    """Ids of ingredients that another model's sweep may borrow, or has borrowed for a soup that is not registered yet."""
    report = tracking.read_report(sweep.id)
    if report and registry.find_version(report.model, report.soup_sha256):
        return set()
    loans = find_loans(sweep.request.soup, sweep.init, lambda _: None)[model]  # what cannot be read of this model is a doubt already
    return {loan.ingredient.trial_id for loan in loans} | set(report.borrowed if report else ())
