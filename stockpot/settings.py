"""What one trial may vary: optimiser, schedule, augmentation and the rest. Defaults are the paper's (Wortsman et al. 2022,
arXiv:2203.05482)."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stockpot.fields import Closed, Fraction


class TrialSettings(Closed):
    """Everything that may differ between the trials of a sweep. Defaults are the paper's (Wortsman et al. 2022, appendix J)."""

    learning_rate: float = Field(2e-5, gt=0, lt=1, description="Peak learning rate, reached after the warm-up.")
    weight_decay: float = Field(0.1, ge=0, lt=10, description="Decoupled weight decay; biases and norms are exempt.")
    epochs: int = Field(10, ge=1, le=10_000, description="Passes over the train split, where `max_steps` does not count them.")
    max_steps: int | None = Field(
        None,
        ge=0,
        description="Optimiser steps of the trial, in place of `epochs`: exactly these, over as many passes as they take, and the schedule "
        "is of them. 0: the init itself, evaluated and never trained. None: `epochs` counts.",
    )
    batch_size: int = Field(512, ge=1, description="Images per optimiser step, over all devices of the trial.")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="Images per forward pass; their gradients are summed up to the batch. BatchNorm then sees "
        "this many at a time. None: the whole batch at once.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="bf16 and fp16 compute under autocast; weights and optimiser stay in fp32. fp16 scales the loss, and leaves out steps "
        "whose gradients overflow.",
    )
    compile: bool = Field(
        False, description="Compile the forward pass (torch.compile). A model that does not compile whole fails the trial with the reason."
    )
    optimiser: Literal["adamw", "adam", "sgd", "rmsprop", "adafactor"] = Field(
        "adamw", description="Update rule. adam couples its weight decay to the gradient; sgd and rmsprop have momentum 0.9."
    )
    sam_rho: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Radius of sharpness-aware minimisation around any rule, at twice the time of a step and a copy of the trained "
        "weights; 0 is off.",
    )
    schedule: Literal["cosine", "constant", "linear"] = Field("cosine", description="Learning rate after the warm-up: to zero, or held.")
    warmup_steps: int = Field(500, ge=0, description="Steps of linear rise from zero; never more than a tenth of all steps.")
    loss: str = Field(
        "cross_entropy", description="cross_entropy, binary_cross_entropy (summed over classes), or `package.module:name`, called with "
        "logits and target probabilities, both (B, C)."
    )  # fmt: skip
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    mixup: float = Field(0.0, ge=0, le=10, description="Alpha of mixup's Beta distribution; 0 switches it off.")
    cutmix: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Alpha of CutMix's Beta distribution; 0 is off. Beside mixup, each batch has one of the two, equally likely.",
    )
    augmentation: str = Field(
        "minimal",
        min_length=1,
        description="none, minimal (crop 90-100 %), medium (timm's default), strong (RandAugment, N=2, M=15), stochastic (RandAugment "
        "of a random level per image), a timm string such as `rand-m9-n2`, or `package.module:name` of your own. timm applies an operation "
        "half of the time and no magnitude above 10; RandAugment as published is `rand-m15-n2-p1-mmax15`.",
    )
    last_epoch_augmentation: str | None = Field(
        None, description="Augmentation of the last epoch, such as `minimal` after strong ones. None: as in the others."
    )
    smallest_crop: Fraction | None = Field(
        None, gt=0, description="Smallest share of the image's area that a crop keeps. None: 0.9 for minimal, timm's 0.08 for the others."
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Factor of the learning rate from each block to the one before it: the head has the full rate, the embeddings the "
        "lowest. 1 gives all layers one rate.",
    )
    frozen: tuple[str, ...] = Field(
        (), description="Parameters that stay as the init has them, by name with wildcards, such as `head.*` or `body.conv1.*`."
    )
    ema_decays: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (),
        description="Decays per step of moving averages of the weights, such as 0.999. Each average is one more candidate ingredient, in "
        "the uniform soup too, and costs twice the memory of the weights: in float64, for float32 loses small steps from 0.9999.",
    )
    evaluate_every_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between evaluations on held_out. The most accurate weights so far, whatever `soup.metric` is and the earlier of "
        "equals, become the ingredient, for each moving average too. None: the last weights do.",
    )
    clip_norm: float = Field(1.0, ge=0, description="Largest gradient norm; 0 switches clipping off.")
    seed: int = Field(0, ge=0, description="Order of samples and augmentation of this trial.")

    @model_validator(mode="after")
    def _averages_differ(self) -> Self:
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError(f"ema_decays {list(self.ema_decays)} has a decay twice; keep one of them")
        return self
