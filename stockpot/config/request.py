"""One retraining, as a person writes it."""

from typing import Self

from pydantic import Field, model_validator

from stockpot.config.data import DataSpec
from stockpot.config.fan_out import FanOutSpec
from stockpot.config.init import TEXT_PREFIX, BaseSpec, InitSpec
from stockpot.config.release import GateSpec, ReleaseSpec
from stockpot.config.soup import SoupSpec
from stockpot.config.sweep import SweepSpec
from stockpot.fields import NAME, Closed, Uri


class RetrainRequest(Closed):
    """One retraining: from pinned data to a registered soup."""

    model: str = Field(
        pattern=NAME,
        description="Registered model, and MLflow experiment, that the soup becomes a version of.",
    )
    store: Uri = Field(
        description="Prefix in object storage where Stockpot keeps inits and training states, such as `s3://stockpot/store`."
    )
    data: DataSpec = Field(description="The snapshots to read.")
    base: BaseSpec = Field(description="The base model.")
    init: InitSpec = Field(default_factory=InitSpec, description="The shared start of all trials.")
    sweep: SweepSpec = Field(default_factory=SweepSpec, description="The trials.")
    soup: SoupSpec = Field(default_factory=SoupSpec, description="The recipe.")
    gate: GateSpec = Field(default_factory=GateSpec, description="The bar for promotion.")
    release: ReleaseSpec = Field(default_factory=ReleaseSpec, description="The version.")
    fan_out: FanOutSpec = Field(default_factory=FanOutSpec, description="Workers, retries and deadlines.")

    @model_validator(mode="after")
    def _stopping_can_spare_a_trial(self) -> Self:
        stop, trials = self.fan_out.stop, self.sweep.trials
        if stop and stop.after >= trials:
            raise ValueError(
                f"`fan_out.stop` asks after {stop.after} finished trials and the sweep has {trials}, so it could spare none; lower "
                "`after`, or ask for more trials"
            )
        return self

    @model_validator(mode="after")
    def _text_needs_a_text_tower(self) -> Self:
        if self.base.arch.startswith(TEXT_PREFIX) or (":" in self.base.arch and "://" not in self.base.arch):
            if self.init.head == "zero_shot":
                raise ValueError(f"`{self.base.arch}` has no text tower for a zero_shot head; ask for the head linear_probe or random")
            if self.base.text_tower == "keep":
                raise ValueError(f"`{self.base.arch}` has no text tower to keep; leave `text_tower` at drop")
        return self

    @model_validator(mode="after")
    def _bodies_are_borrowed_under_a_frozen_head(self) -> Self:
        if self.soup.bodies_of and not self.init.freeze_head:
            raise ValueError("`soup.bodies_of` borrows bodies, which fit a head that nobody trains; write `init.freeze_head: true`")
        if self.model in self.soup.bodies_of:
            raise ValueError(f"`soup.bodies_of` names {self.model} itself, whose own ingredients join by `soup.earlier`")
        return self

    @model_validator(mode="after")
    def _tokens_are_no_pixels(self) -> Self:
        if self.base.arch.startswith(TEXT_PREFIX) and (self.base.preprocess or self.release.torch_export):
            field = "base.preprocess" if self.base.preprocess else "release.torch_export"
            raise ValueError(f"`{self.base.arch}` reads tokens and `{field}` is about pixels; leave it out")
        return self
