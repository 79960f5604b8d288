"""What one attempt of a trial leaves for the next: a claim, training states, and what counts as the trial's ingredients. In object storage,
so the next may run on another worker. Who may write, and what stands, is the journal's to decide.

`{store}/training/{model}/{trial}/` holds the journal's entries and, named by the last of them, at most one state of each attempt:
`state-{claim}-{start of its sha256}.safetensors`, which counts from the moment an entry names it. No state outlives the entry that counts
the trial's own ingredient, its last: whatever happens then, one entry remains, which refuses whoever is still at work.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from stockpot import storage
from stockpot.checkpoints import load_weights, save_weights
from stockpot.config import Trial
from stockpot.errors import TrialFailed
from stockpot.outcomes import Ingredient
from stockpot.training.journal import Journal, StateNote

State = dict[str, Tensor]


class Attempt:
    """One process's hold on a trial. Raises `TrialFailed` from `save` and `record` when a later attempt took over: nothing of it stands."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.journal = Journal(trial)
        self.claim = self.journal.claim
        self._saved_at = time.monotonic()

    def resume(self) -> State | None:
        """The last state that counts, None when there is none. Raises `BadRequest` when it belongs to another snapshot or init."""
        found = self.journal.standing.state
        if found is None:
            return None
        found.require_of(self.trial)
        with TemporaryDirectory(prefix="stockpot-state-") as folder:
            path = Path(folder) / "state.safetensors"
            storage.download(f"{self.journal.root}/{found.file}", path, found.sha256)
            return load_weights(path)

    def save_when_due(self, step: int, state: Callable[[], State]) -> None:
        """Save when `state_interval_s` have passed since the last time."""
        if time.monotonic() - self._saved_at >= self.trial.state_interval_s:
            self.save(step, state())

    def save(self, step: int, state: State) -> None:
        """Commit a state and forget the earlier ones."""
        with TemporaryDirectory(prefix="stockpot-state-") as folder:
            path = Path(folder) / "state.safetensors"
            sha256 = save_weights(path, state)
            file, trial = f"state-{self.claim:010d}-{sha256[:16]}.safetensors", self.trial
            note = StateNote(file=file, step=step, sha256=sha256, snapshot=trial.snapshot.digest, init=trial.init.digest)
            storage.upload(path, f"{self.journal.root}/{note.file}")
        self.journal.write(lambda _standing: {"state": note})
        self._saved_at = time.monotonic()

    @property
    def recorded(self) -> dict[str, Ingredient]:
        """The ingredients that count, by id: recorded by this attempt or an earlier one."""
        return self.journal.standing.ingredients

    def record(self, ingredient: Ingredient) -> None:
        """Let an ingredient, whose files the ledger has, count as the trial's from now on. With its own, the last, nothing is left to
        train, and its training state is forgotten: of a trial that the ledger shows as finished there is no further attempt that would."""
        last = {"state": None} if ingredient.trial_id == self.trial.id else {}
        self.journal.write(lambda standing: {"ingredients": {**standing.ingredients, ingredient.trial_id: ingredient}, **last})

    def finish(self) -> None:
        """End the trial: its ingredients are in the ledger, and are found there from now on. A later attempt ends it itself."""
        with suppress(TrialFailed):
            self.journal.write(lambda _standing: {"state": None, "ingredients": {}, "ended": True})
