"""What one attempt of a trial leaves for the next: a claim, and training states. In object storage, so the next may run on another worker.

`{store}/training/{model}/{trial}/` holds `claim-0001`, ... (created conditionally, one per attempt; the highest owns it) and, per state,
`state-{step}-{claim}.safetensors` with a `.json` of the same name: the commit marker, written last, with the weights' sha256. A state
without its marker does not exist. Everything is removed once the ingredient is recorded.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from stockpot import storage
from stockpot.checkpoints import load_weights, save_weights
from stockpot.config import Trial
from stockpot.digests import canonical
from stockpot.errors import BadRequest, ObjectExists, ObjectMissing, TrialFailed

State = dict[str, Tensor]


class Attempt:
    """One process's hold on a trial. Raises `TrialFailed` from `require_hold` and `save` when a later attempt took over."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.root = f"{trial.store.rstrip('/')}/training/{trial.model}/{trial.id}"
        self.claim = self._take()
        self._saved_at = time.monotonic()

    def _take(self) -> int:
        claim = self._highest() + 1
        while True:
            try:
                storage.write_bytes(f"{self.root}/claim-{claim:04d}", b"", create=True)
            except ObjectExists:
                claim += 1
            else:
                return claim

    def _highest(self) -> int:
        claims = [re.search(r"/claim-(\d+)$", found.uri) for found in storage.list_prefix(f"{self.root}/")]
        return max((int(claim[1]) for claim in claims if claim), default=0)

    def require_hold(self) -> None:
        """Return while this attempt is the latest one, whose word alone counts."""
        if self._highest() != self.claim:
            raise TrialFailed(f"Attempt {self.claim} of trial {self.trial.id} was replaced by a later one, which goes on; this one stops.")

    def resume(self) -> State | None:
        """The furthest committed state, None when there is none. Raises `BadRequest` when it belongs to another snapshot or init."""
        while markers := self._markers():
            try:
                return self._read(markers[-1])
            except ObjectMissing:
                if markers == self._markers():
                    raise  # nobody moved on: a part of this state is lost
        return None

    def _read(self, furthest: str) -> State:
        """The state of that marker. Raises `ObjectMissing` when an earlier attempt, still at work, has just put another in its place."""
        marker = json.loads(storage.read_bytes(furthest))
        for name, wanted in self._identity().items():
            if marker[name] != wanted:
                raise BadRequest(
                    f"The training state of trial {self.trial.id} was made with {name} {marker[name][:12]}, the trial has {wanted[:12]}; "
                    f"remove {self.root} to start it anew."
                )
        with TemporaryDirectory(prefix="stockpot-state-") as folder:
            path = Path(folder) / "state.safetensors"
            storage.download(furthest.removesuffix(".json") + ".safetensors", path, marker["sha256"])
            return load_weights(path)

    def save_when_due(self, step: int, state: Callable[[], State]) -> None:
        """Save when `state_interval_s` have passed since the last time."""
        if time.monotonic() - self._saved_at >= self.trial.state_interval_s:
            self.save(step, state())

    def save(self, step: int, state: State) -> None:
        """Commit a state and forget the earlier ones."""
        self.require_hold()
        earlier = self._markers()
        name = f"{self.root}/state-{step:08d}-{self.claim:04d}"
        with TemporaryDirectory(prefix="stockpot-state-") as folder:
            path = Path(folder) / "state.safetensors"
            sha256 = save_weights(path, state)
            storage.upload(path, f"{name}.safetensors")
        storage.write_bytes(f"{name}.json", canonical({"step": step, "sha256": sha256, **self._identity()}))
        for marker in earlier:
            if marker != f"{name}.json":
                storage.remove(marker)
                storage.remove(marker.removesuffix(".json") + ".safetensors")
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Remove the states and claims up to this attempt's: the trial is in the ledger, and is found there from now on. What a later
        attempt has written is left to it."""
        for found in storage.list_prefix(f"{self.root}/"):
            if (claim := re.search(r"-(\d+)(\.\w+)?$", found.uri)) and int(claim[1]) <= self.claim:
                storage.remove(found.uri)

    def _markers(self) -> list[str]:
        return sorted(found.uri for found in storage.list_prefix(f"{self.root}/") if re.search(r"/state-\d+-\d+\.json$", found.uri))

    def _identity(self) -> dict[str, str]:
        return {"snapshot": self.trial.snapshot.digest, "init": self.trial.init.digest}
