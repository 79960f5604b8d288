"""A trial's journal in object storage: numbered entries, each created only where nobody created it before, so that of two attempts only
one is the next to write. Knows no tensors: whoever dispatches trials reads it too.

An entry is the whole standing of the trial: whose it is, its training state, the ingredients that count. The highest one stands. To
decide anything is to write the entry after the last one known; whoever finds that number taken, or a higher one, was overtaken, and what
it wanted does not stand. So lower entries may be removed at any time, and the highest never is: after the trial it is all that is left.
"""

import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pydantic import Field

from stockpot import storage
from stockpot.config import Trial
from stockpot.digests import canonical
from stockpot.errors import BadRequest, ObjectExists, ObjectMissing, TrialFailed
from stockpot.fields import Closed
from stockpot.outcomes import Ingredient

FINISHED = 99_999_999
"""The step of a state whose training has ended, beyond any that is trained: resumed, it only hands over its candidates."""


class StateNote(Closed):
    """A training state that counts."""

    file: str
    """Its name below the journal's folder."""
    step: int
    sha256: str
    snapshot: str
    """Digest of the data it was made with."""
    init: str
    """Digest of the init it was made from."""

    def require_of(self, trial: Trial) -> None:
        """Raises `BadRequest` unless it was made with the trial's snapshot and init. A sweep's trials have their ids from both, so only one
        that was written by hand finds another's."""
        for name, made, wanted in (("snapshot", self.snapshot, trial.snapshot.digest), ("init", self.init, trial.init.digest)):
            if made != wanted:
                raise BadRequest(
                    f"The training state of trial {trial.id} was made with {name} {made[:12]}, the trial has {wanted[:12]}; "
                    f"remove {folder(trial)} to start it anew."
                )


class Standing(Closed):
    """How a trial stands."""

    claim: int = 0
    """Number of the entry by which the attempt that holds the trial took it."""
    state: StateNote | None = None
    ingredients: dict[str, Ingredient] = Field(default_factory=dict)
    """What counts as the trial's, by id, whether or not the ledger shows it already."""
    ended: bool = False


def folder(trial: Trial) -> str:
    """Where a trial's journal and training states lie."""
    return f"{trial.store.rstrip('/')}/training/{trial.model}/{trial.id}"


def progress(trial: Trial) -> int:
    """How far a trial has come: the step of its training state, 0 without one, the last once its own ingredient counts, and its ingredients
    so far."""
    found = _last(folder(trial))[1]
    step = FINISHED if trial.id in found.ingredients else found.state.step if found.state else 0
    return step + len(found.ingredients)


def require_own_state(trial: Trial) -> None:
    """Raises `BadRequest` where the trial would go on from a state of another snapshot or init; asked before a GPU is taken."""
    if found := _last(folder(trial))[1].state:
        found.require_of(trial)


class Journal:
    """One attempt's hold on a trial, from its claim on. `write` raises `TrialFailed` once a later attempt took over.

    claim: the number of this attempt's first entry. standing: as last read, which after that error is what the later attempt goes on with.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.root = folder(trial)
        self.number, self.standing = self._claimed()
        self.claim = self.number
        self._forget(self.number, self.standing)  # what an attempt that was killed could not

    def _claimed(self) -> tuple[int, Standing]:
        while True:
            last, before = _last(self.root)
            number = last + 1 if last else int(time.time())  # beyond the numbers of a journal that somebody has removed
            standing = (Standing() if before.ended else before).model_copy(update={"claim": number})
            if self._created(number, standing):
                return number, standing

    def write(self, change: Callable[[Standing], dict[str, Any]]) -> None:
        """Write the next entry: the standing with the fields that `change` makes of it."""
        while True:
            wanted = self.standing.model_copy(update=change(self.standing))
            if self._created(self.number + 1, wanted):
                self.number, self.standing = self.number + 1, wanted
                self._forget(self.number, wanted)
                return
            number, found = _last(self.root)
            self.standing = found
            if found.claim != self.claim:
                self._forget(number, found)
                raise TrialFailed(f"This attempt of trial {self.trial.id} was replaced by a later one, which goes on; it stops.")
            self.number = number  # its own, by a rank's process, or by a request whose answer was lost

    def _created(self, number: int, standing: Standing) -> bool:
        """Whether this entry is now the highest. One that could be created because earlier entries were removed is not."""
        with suppress(ObjectExists):
            storage.write_bytes(_entry(self.root, number), canonical(standing), create=True)
            return max(_numbers(self.root), default=0) == number
        return False

    def _forget(self, last: int, standing: Standing) -> None:
        """Remove entries below the last one, and states up to this attempt's that it does not name: none will be named again. What a later
        attempt has stored is left to it."""
        named = standing.state.file if standing.state else None
        for found in storage.list_prefix(f"{self.root}/"):
            name = found.uri.removeprefix(f"{self.root}/")
            entry, state = re.fullmatch(r"entry-(\d+)", name), re.fullmatch(r"state-(\d+)-\w+\.safetensors", name)
            if (entry and int(entry[1]) < last) or (state and int(state[1]) <= self.claim and name != named):
                storage.remove(found.uri)


def _last(root: str) -> tuple[int, Standing]:
    """The highest entry and its number; 0 where there is none."""
    while numbers := _numbers(root):
        with suppress(ObjectMissing):  # a higher one has just taken its place
            return max(numbers), Standing.model_validate_json(storage.read_bytes(_entry(root, max(numbers))))
    return 0, Standing()


def _numbers(root: str) -> list[int]:
    return [int(found.uri[-10:]) for found in storage.list_prefix(f"{root}/entry-")]


def _entry(root: str, number: int) -> str:
    return f"{root}/entry-{number:010d}"
