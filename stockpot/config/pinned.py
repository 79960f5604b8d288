"""A request after pinning and drawing: trials that a worker can run without asking anybody, and the sweep they belong to."""

from typing import Literal

from pydantic import Field

from stockpot.config.data import PinnedData, PinnedSnapshot
from stockpot.config.init import Init
from stockpot.config.request import RetrainRequest
from stockpot.digests import short
from stockpot.fields import Closed, Uri
from stockpot.settings import TrialSettings


class Trial(Closed):
    """One fine-tuning, complete in itself: a worker needs nothing else but endpoints. Its id is a digest of what decides its result."""

    id: str
    sweep_id: str
    model: str
    index: int = Field(ge=0, description="Place in the sweep, from 0.")
    settings: TrialSettings
    snapshot: PinnedSnapshot
    init: Init
    store: Uri
    loader_workers: int = 0
    skip_fraction: float = 0.0
    reading: Literal["auto", "cached", "streamed"] = "auto"
    state_interval_s: int = 300
    budget_s: int | None = None
    gpus: int = 1
    sharded: bool = False

    def ingredient_id(self, ema_decay: float = 0.0) -> str:
        """The id of the ingredient the trial leaves: its own, or that of a moving average of its weights."""
        return f"{self.id}-ema-{ema_decay!r}" if ema_decay else self.id

    @property
    def ingredient_ids(self) -> tuple[str, ...]:
        """Every ingredient the trial leaves."""
        return tuple(self.ingredient_id(decay) for decay in (0.0, *self.settings.ema_decays))


class Sweep(Closed):
    """A request after pinning and drawing: stored with the sweep in the ledger, so that `soup` needs only its id."""

    id: str
    request: RetrainRequest
    data: PinnedData
    init: Init
    trials: tuple[Trial, ...]


def sweep_id(request: RetrainRequest, data: PinnedData, init: Init) -> str:
    """The id of a sweep: everything that decides its soup, nothing that only decides how it is run."""
    return short([request.model, data, init.digest, request.sweep, request.soup])
