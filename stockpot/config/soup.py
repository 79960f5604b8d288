"""How ingredients become a soup."""

from operator import not_
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stockpot.fields import NAME, Closed, Fraction, Metric


class MixingSpec(Closed):
    """How the learned recipes find their weights. They are fitted on a part of held_out, drawn by keyed hash, and scored on the rest of it,
    with the other recipes beside them there; greedy still ranks on all of it, and the gate split stays unseen."""

    share: Fraction = Field(0.5, gt=0, lt=1, description="Share of held_out the weights are fitted on; the recipe is scored on the rest.")
    epochs: int = Field(5, ge=1, le=1000, description="Passes over that share. The paper's 5.")
    batch_size: int = Field(256, ge=1, description="Samples in a step.")
    learning_rate: float = Field(0.05, gt=0, lt=10, description="Of AdamW on the weights' logits. The paper's 0.05.")
    ingredients: int = Field(16, ge=1, description="Only the best so many are mixed: every step reads each of them twice.")


Recipe = Literal["greedy", "uniform", "pruned", "learned", "learned_by_layer", "model_stock", "wise_ft"]


class SoupSpec(Closed):
    """How ingredients become a soup."""

    recipe: Recipe = Field("greedy", description="The recipe that ships. Greedy and uniform are always shown.")
    metric: Metric = Field(
        "accuracy",
        description="What greedy and pruned rank and decide by, and the gate compares. macro_f1 (mean F1 over classes) and mcc (Matthews "
        "correlation) suit uneven classes; every candidate is then scored in full, for only accuracy can be lost early. A trial's own best "
        "step stays the one with most right answers.",
    )
    minimum: int = Field(1, ge=1, le=1000, description="The sweep's own ingredients that must be fit; with fewer no soup is cooked.")
    barrier: Fraction | None = Field(
        None,
        gt=0,
        description="Leave out an ingredient that lies in another basin: half way to the best single model, held_out accuracy is lower "
        "than the mean of both ends by more than this fraction. 0.2 puts out only what plainly does. It costs an evaluation each. None: "
        "only the init's digest tells strangers apart; midpoints and angles, which `compare` shows, put nothing out.",
    )
    accept: Literal["improve", "not_worse"] = Field(
        "improve", description="Greedy keeps an ingredient on strict improvement of held-out accuracy, or also on a tie."
    )
    passes: int = Field(1, ge=1, le=100, description="How often greedy visits the ingredients; a pass that keeps nothing is the last.")
    replacement: bool = Field(False, description="Later visits may add a member again, which then counts twice. Needs 2 passes or more.")
    visit_seed: int | None = Field(
        None, ge=0, description="Visit all but the best ingredient in the random order of this seed, for analysis. None: as `order` says."
    )
    order: Literal["accuracy", "averaged_logits"] = Field(
        "accuracy",
        description="Greedy starts with the best ingredient. accuracy: then the others, by their own held-out accuracy, as the paper does. "
        "averaged_logits: those first whose stored logits, averaged with the soup's members', are right most often; it costs no forward "
        "pass, and is ranked again whenever the soup grows.",
    )
    budget: int | None = Field(
        None,
        ge=1,
        description="Candidates greedy scores at most; the rest is never visited. None: all. For `order: averaged_logits`.",
    )
    earlier: int = Field(
        0,
        ge=0,
        le=1000,
        description="How many ingredients of earlier sweeps of this model may join, the best on their own held_out first, if they started "
        "from the same init. They are scored on this sweep's held_out, at one evaluation each.",
    )
    bodies_of: dict[Annotated[str, Field(pattern=NAME)], Annotated[int, Field(ge=1, le=1000)]] = Field(
        default_factory=dict,
        exclude_if=not_,  # the id of a sweep that borrows nothing is what it was before there was this field
        description="Other models, by name, and how many ingredients of each may join, the best on their own held_out first, as in the "
        "paper's soups across datasets: their bodies, under this sweep's head. Both sides need `init.freeze_head`, the same base model and "
        "equally prepared inputs. Each is scored on this sweep's held_out, at one evaluation, and left out if it was trained on any of it.",
    )
    champion: bool = Field(
        False,
        description="Whether the model's champion joins as one more ingredient, if it started from the same init. It is scored on this "
        "sweep's held_out, which it may have been chosen on, so its place in the order flatters it; the gate split does not.",
    )
    alpha: Fraction = Field(
        0.5, description="Of the recipe `wise_ft`: the greedy soup's share, the rest is the init. The paper's 0.5, chosen without looking."
    )
    batch_norm_samples: int | None = Field(
        None,
        ge=64,
        le=65_536,
        description="Estimate BatchNorm statistics again on so many training samples whenever weights were averaged, for soups and single "
        "models alike; every candidate costs as many forward passes more. It can ruin a model: every soup of an EfficientNet lost 0.2 to "
        "0.6 points by it, and one trained with frozen statistics fell from 86 to 50 %. None: they are averaged as any weight is.",
    )
    mixing: MixingSpec = Field(default_factory=MixingSpec, description="Of the recipes `learned` and `learned_by_layer`.")
    compare: tuple[
        Literal[
            "pruned",
            "learned",
            "learned_by_layer",
            "model_stock",
            "ensemble",
            "greedy_ensemble",
            "wise_ft",
            "angles",
            "midpoints",
            "marginal",
        ],
        ...,
    ] = Field((), description="Recipes and yardsticks shown beside the soup, never shipped; each costs evaluations.")

    @model_validator(mode="after")
    def _replacement_needs_a_second_pass(self) -> Self:
        if self.replacement and self.passes == 1:
            raise ValueError("`replacement` adds members again on a later pass and `passes` is 1; write `passes: 2` or more")
        return self

    @model_validator(mode="after")
    def _one_order(self) -> Self:
        if self.visit_seed is not None and self.order != "accuracy":
            raise ValueError(f"`visit_seed` asks for a random order and `order` for {self.order}; keep one of them")
        return self
