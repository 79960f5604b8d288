"""Every noun a person may write down: the request and its parts. Fields carry their unit, range and reason; they become
the form on the Prefect page. Frozen and closed: an unknown field is refused, a default is part of the identity.

Endpoints and secrets are not here: they come from the standard environment names (`PREFECT_API_URL`,
`MLFLOW_TRACKING_URI`, `AWS_ENDPOINT_URL`, ...). Nothing else is a setting.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stockpot.digests import short
from stockpot.fields import NAME, Closed, Fraction, Metric, Uri
from stockpot.preparation import Preprocess
from stockpot.settings import TrialSettings
from stockpot.spaces import Distribution, deciding


class DataSpec(Closed):
    """What is read: snapshots, never globs."""

    snapshot: Uri = Field(
        description="A manifest (`s3://bucket/digits/snapshots/<digest>.json`), or a dataset (`s3://bucket/digits`), whose newest "
        "snapshot is then pinned when the flow starts. Holds the splits train, held_out and gate."
    )
    test: Uri | None = Field(None, description="Snapshot read once, for the report; it never selects.")
    shifts: dict[str, Uri] = Field(default_factory=dict, description="Shift suites, name to snapshot: reported and gated, never selecting.")
    loader_workers: int = Field(
        0, ge=0, le=64, description="Processes that decode and augment for one trial. 0 decodes in the trial itself."
    )
    skip_fraction: Fraction = Field(
        0.0, description="Share of train samples that may be unreadable before the trial fails. held_out, gate and test allow none."
    )
    reading: Literal["auto", "cached", "streamed"] = Field(
        "auto",
        description="cached: shards on the node's disk, fetched once for all its trials. streamed: from storage every epoch. "
        "auto: cached where the snapshot fits. The samples and their order are the same.",
    )


TEXT_PREFIX = "transformers:"
"""How the architecture of a text encoder begins."""


class BaseSpec(Closed):
    """The base model every trial starts from."""

    arch: str = Field(
        min_length=1,
        description="An open_clip architecture (`ViT-B-32`), the URI of an open_clip JSON config (which may name a timm image tower), or "
        "`timm:NAME`, such as `timm:vit_base_patch16_224.augreg_in21k`, whose images are prepared as timm does for that name; or your own "
        "backbone, `package.module:name`, called without arguments. For texts, `transformers:` and the address of an encoder's "
        "`config.json`, or its name on the hub; the samples are then arrays of token ids (`.npy`).",
    )
    weights: str | None = Field(
        None,
        description="A pretrained tag of that architecture (of a text encoder a revision on the hub, such as `main`), or the URI of a "
        "state dict: safetensors, or torch's format, read without running any of it. None: random weights, or what your own backbone has.",
    )
    preprocess: Preprocess | None = Field(
        None, description="How images are prepared. None: as the architecture or the tag says; a backbone of your own says nothing."
    )
    max_tokens: int = Field(
        128, ge=1, le=65_536, description="Tokens that a text encoder reads of a sample; longer ones are cut at their end. The paper's 128."
    )
    text_tower: Literal["drop", "keep"] = Field(
        "drop",
        description="drop: the text tower builds the zero-shot head and stays behind. keep: it travels with every model, frozen, so that "
        "the soup can still be asked about classes it was not trained on; each stored model is larger by it.",
    )


class InitSpec(Closed):
    """The shared initialisation: body and head, built once and hashed. Only models with one init may be averaged."""

    head: Literal["zero_shot", "linear_probe", "random"] = Field(
        "linear_probe",
        description="zero_shot: from the text tower. linear_probe: fitted on the train split's features to convergence, started from the "
        "zero-shot head where there is a text tower. random: from the seed.",
    )
    templates: tuple[str, ...] = Field(
        ("a photo of a {}.",), min_length=1, description="Prompt templates, `{}` is the class name; their embeddings are averaged."
    )
    seed: int = Field(0, ge=0, description="Seeds a random head or random base weights.")
    freeze_head: bool = Field(
        False, description="Leave the head as it is and train the body alone, as soups across datasets need it of zero_shot heads."
    )

    @model_validator(mode="after")
    def _templates_have_a_place(self) -> Self:
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"template {template!r} has no `{{}}` for the class name; write it like 'a photo of a {{}}.'")
        return self


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


class MixingSpec(Closed):
    """How the learned recipes find their weights. They are fitted on a part of held_out, drawn by keyed hash, that nothing else is fitted
    on; greedy still ranks on all of it, and the gate split stays unseen."""

    share: Fraction = Field(0.5, gt=0, description="Share of held_out the weights are fitted on; the recipe is scored on all of it.")
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


class GateSpec(Closed):
    """What a challenger must show to become champion. It is judged on the gate split, which nothing was selected on."""

    gate_tolerance: Fraction = Field(0.0, description="Largest loss of gate accuracy against the champion that still passes.")
    shift_tolerance: Fraction = Field(0.02, description="Largest loss of accuracy on any one shift suite that still passes.")
    suite_tolerances: dict[str, Fraction] = Field(default_factory=dict, description="Another tolerance for single suites, by name.")
    calibration_tolerance: Fraction | None = Field(
        None,
        description="Largest rise of the expected calibration error on the gate split that still passes. None: it is reported, not judged.",
    )
    latency_tolerance: float | None = Field(
        None,
        ge=0,
        description="Largest rise of the time for one image that still passes, as a share of the champion's (0.1: a tenth slower); both "
        "are timed in turn on one machine, and the median ratio counts. None: it is reported, not judged.",
    )
    size_tolerance: float | None = Field(
        None, ge=0, description="Largest growth of the weights' bytes that still passes, as a share of the champion's. None: reported only."
    )
    approval: bool = Field(
        False,
        description="Whether what passes also waits for a person: a run of `approve` is then suspended in Prefect, holding no worker and "
        "no GPU, until somebody resumes it and says yes or no; meanwhile the version is `challenger`.",
    )


class ReleaseSpec(Closed):
    """How a soup becomes a version, and who has the last word. None of it changes the soup, so none of it is part of a sweep's identity."""

    torch_export: bool = Field(
        False,
        description="Store the soup also as a pt2 archive, so that `mlflow.pytorch.load_model` works, without pickle. A second copy of the "
        "weights; it takes pixels in [0, 1] and gives logits. Decided when a soup is first stored.",
    )


class StopSpec(Closed):
    """When a sweep has had enough: no further trial is started, those that run are seen through, and the soup is cooked from what
    finished. What the gain is estimated from is told in `stockpot.soup.stopping`."""

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
        description="How often a trial is started before it counts as failed. A trial that fails by its own fault (bad numbers, bad data) "
        "is not started again.",
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
    budget_s: int | None = Field(
        None,
        ge=1,
        description="Seconds after which an attempt saves its training state and ends, for the next attempt to go on from there, as on a "
        "node that is lent by the hour. Each counts as one of `attempts`. None: no limit.",
    )
    stop: StopSpec | None = Field(
        None,
        description="When to start no further trial. The quorum is then of the trials that were started. None: every trial is run.",
    )


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
    def _tokens_are_no_pixels(self) -> Self:
        if self.base.arch.startswith(TEXT_PREFIX) and (self.base.preprocess or self.release.torch_export):
            field = "base.preprocess" if self.base.preprocess else "release.torch_export"
            raise ValueError(f"`{self.base.arch}` reads tokens and `{field}` is about pixels; leave it out")
        return self


class PinnedSnapshot(Closed):
    """A snapshot by address and content."""

    uri: Uri = Field(description="Its manifest.")
    digest: str = Field(description="sha256 of the manifest's canonical JSON.")


class PinnedData(Closed):
    """The request's data after pinning: every later step reads exactly these bytes."""

    snapshot: PinnedSnapshot
    test: PinnedSnapshot | None = None
    shifts: dict[str, PinnedSnapshot] = Field(default_factory=dict)


class Init(Closed):
    """The shared initialisation: a folder in object storage with weights, model config and head."""

    uri: Uri = Field(description="Folder holding `model.safetensors`, `model.json` and `fingerprint.json`.")
    digest: str = Field(description="Of the weights and the model config: two trials are soupable only when this is equal.")


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
