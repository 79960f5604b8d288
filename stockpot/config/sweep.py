"""Which trials are run."""

import math
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from stockpot.fields import Closed
from stockpot.settings import TrialSettings
from stockpot.spaces import Distribution, deciding


class SweepSpec(Closed):
    """Which trials are run."""

    trials: int = Field(8, ge=1, le=1000, description="Number of trials. More trials later keep the ones already drawn.")
    seed: int = Field(0, ge=0, description="The same request and seed draw the same trials on any machine.")
    settings: TrialSettings = Field(
        default_factory=TrialSettings, description="What all trials share, where the space does not say otherwise."
    )
    space: dict[str, Distribution] = Field(
        default_factory=dict,
        description="A distribution for any field of the settings, such as `learning_rate: {log_uniform: [1e-6, 1e-4]}`. "
        "Each trial gets its own `seed` unless the space or the grid gives it.",
    )
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="Values for any field of the settings; every combination is one trial, and `trials` is their number. "
        "Fields of the space are drawn beside it.",
    )
    init_as_ingredient: bool = Field(
        False, description="The init itself as one more trial, which is evaluated and never trained, as in the paper's extreme grid."
    )

    @model_validator(mode="after")
    def _space_and_grid_name_settings(self) -> Self:
        for name in [*self.space, *self.grid, *deciding(*self.space.values())]:
            if name not in TrialSettings.model_fields:
                raise ValueError(f"`{name}` is no trial setting; a sweep may vary {', '.join(sorted(TrialSettings.model_fields))}")
            if name in self.space and name in self.grid:
                raise ValueError(f"`{name}` is in the space and in the grid; keep one of them")
        return self

    @model_validator(mode="after")
    def _trials_fill_the_grid(self) -> Self:
        cells = math.prod(len(values) for values in self.grid.values())
        if self.grid and self.trials != cells:
            raise ValueError(f"the grid has {cells} combinations and `trials` is {self.trials}; write `trials: {cells}`")
        return self
