"""How trials are spread over workers, and when a sweep has had enough."""

from typing import Self

from pydantic import Field, model_validator

from stockpot.fields import Closed, Fraction


class StopSpec(Closed):
    """When a sweep has had enough: no further trial is started, those that run are seen through, and the soup is cooked from what
    finished. What the gain is estimated from is told in `stockpot.soup.sufficiency`."""

    below: float = Field(
        gt=0,
        lt=1,
        description="What one more trial must be expected to add for the sweep to go on: held-out accuracy (or the soup's other metric) as "
        "a fraction, 0.0005 is 0.05 points. One held-out sample's worth or less is noise.",
    )
    after: int = Field(
        8, ge=2, le=1000, description="Finished trials before the question is asked. 8 are three doublings; fewer tell little."
    )


class FanOutSpec(Closed):
    """How trials are spread over workers. None of this changes a result, so none of it is part of a sweep's identity."""

    deployment: str = Field("finetune/stockpot", description="The Prefect deployment that runs one trial.")
    quorum: Fraction = Field(0.5, description="Share of the trials that must finish before a soup is cooked.")
    deadline_s: int | None = Field(
        None,
        ge=1,
        description="Seconds after which the soup is cooked from what finished; running trials are cancelled. None: wait for all.",
    )
    attempts: int = Field(
        3,
        ge=1,
        le=20,
        description="How many of a trial's starts may end without having got further (by its training states) before it counts as failed: "
        "a preemption, or the end of `budget_s`, is held against no trial that moved on, nor is a node whose GPUs are all held. Counted "
        "anew when the request is run again. One that fails by its own fault (bad numbers, bad data) is not started again.",
    )
    starts: int = Field(
        100,
        ge=1,
        le=10_000,
        description="How often a trial is started at the most, whatever its starts came to, earlier runs of the request included; one that "
        "has had them all is started once more whenever the request is run again.",
    )
    state_interval_s: int = Field(
        300,
        ge=1,
        description="Seconds between training states in the store: a killed trial loses at most these. On SIGTERM one is written at once.",
    )
    retry_delay_s: int = Field(30, ge=1, le=3600, description="Seconds between a crash and the next attempt.")
    gpus: int = Field(
        1,
        ge=1,
        le=16,
        description="GPUs of one node that train a trial together, each on its share of every batch (on a node without any: processes). "
        "`batch_size` must be a multiple of it, with mixup or CutMix of twice it; BatchNorm sees a GPU's share.",
    )
    sharded: bool = Field(
        False,
        description="Whether a trial's `gpus` share the model too, for one that does not fit beside its gradients and moments: each holds "
        "its part of every weight, gradient, moment and moving average, and a block whole only while that computes (FSDP2; bf16 and fp16 "
        "keep their copy of all weights through a step). Slower, without `compile` and adafactor. An evaluation takes the whole model, its "
        "weights alone, on one GPU.",
    )
    budget_s: int | None = Field(
        None,
        ge=1,
        description="Seconds after which an attempt saves its training state and ends, for the next attempt to go on from there, as on a "
        "node that is lent by the hour. None: no limit.",
    )
    stop: StopSpec | None = Field(
        None,
        description="When to start no further trial. The quorum is then of the trials that were started. None: every trial is run.",
    )

    @model_validator(mode="after")
    def _shares_need_several_gpus(self) -> Self:
        if self.sharded and self.gpus == 1:
            raise ValueError("`sharded` cuts a model over the GPUs of a trial, which has one; ask for more `gpus`, or leave `sharded` out")
        return self
