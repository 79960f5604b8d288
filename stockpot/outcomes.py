"""What one step hands to the next: ids, counts and URIs, small enough to travel through Prefect and to be printed.
Weights, logits and pixels never appear here; they lie in object storage under the ids."""

from pydantic import Field

from stockpot.config import PinnedData, StopSpec
from stockpot.fields import Closed, Metric
from stockpot.settings import TrialSettings


class Accuracy(Closed):
    """Top-1 accuracy as integer counts; the fraction is derived, never stored. Beside them the request's metric, where it is another."""

    correct: int = Field(ge=0)
    seen: int = Field(gt=0)
    other: float | None = Field(None, description="Macro F1 or Matthews correlation, where the request ranks by it.")

    @property
    def value(self) -> float:
        """What it is ranked and shown by: the fraction right, in [0, 1], or the other metric."""
        return self.correct / self.seen if self.other is None else self.other

    @property
    def told(self) -> str:
        """`381 of 400`, or the other metric in percent."""
        return f"{self.correct} of {self.seen}" if self.other is None else f"{100 * self.other:.2f}"


def soup_id(soup_sha256: str) -> str:
    """What a stored soup is called: in the ledger, and as an ingredient."""
    return f"soup-{soup_sha256[:12]}"


class Ingredient(Closed):
    """A finished trial, as the ledger knows it; or the champion, where it joins a pool."""

    trial_id: str = Field(description="Of its trial; a moving average's has `-ema-` and its decay behind it. A champion's is `soup_id`.")
    index: int = Field(description="Place in its sweep, from 0; a champion's is behind the last trial.")
    ema_decay: float = Field(0.0, description="Of the moving average these weights are; 0 is the trained weights themselves.")
    model_id: str = Field(description="MLflow LoggedModel that holds the weights, logits and card.")
    mlflow_run_id: str
    weights_sha256: str
    files: dict[str, str] = Field(default_factory=dict, description="sha256 of the logits, the card and the config beside the weights.")
    init_digest: str
    transform_digest: str = Field(description="Of the evaluation transform: accuracies with different digests are never compared.")
    held_out: Accuracy
    settings: TrialSettings | None = Field(None, description="None of a champion, which is no trial.")
    seconds: float = Field(description="Of the whole trial.")
    gpus: int = Field(1, description="Accelerators the trial held for that time.")


class SweepSummary(Closed):
    """One line about a sweep, for a list of them."""

    sweep_id: str
    model: str
    mlflow_run_id: str
    status: str = Field(description="As MLflow says it: RUNNING, FINISHED, FAILED or KILLED.")
    trials: int = Field(description="Planned.")
    finished: int = Field(description="Counted when the sweep was closed; 0 before.")
    init: str = Field("", description="Digest of its init; empty where none was recorded.")
    started: str = Field(description="ISO 8601, UTC.")


class GreedyStep(Closed):
    """One decision of the greedy recipe."""

    trial_id: str
    before: Accuracy | None = Field(description="The soup's held-out accuracy before; None for the first ingredient.")
    after: Accuracy = Field(description="With this ingredient added. Exact when every sample was examined, else the most it could be.")
    kept: bool
    size: int = Field(description="Ingredients in the soup after the decision.")
    examined: int = Field(0, description="Held-out samples looked at: a candidate that is lost already is not looked at further.")

    @property
    def exact(self) -> bool:
        """Whether `after` is the count itself, not an upper bound."""
        return self.examined >= self.after.seen

    @property
    def lacked(self) -> int | None:
        """Right answers that kept it out, fewer than the soup had without it; None where it was kept, or nobody counted."""
        counted = self.before and self.exact and not self.kept and self.after.other is None
        return self.before.correct - self.after.correct if self.before and counted else None


class Scores(Closed):
    """One model on every split that was asked for."""

    held_out: Accuracy
    gate: Accuracy | None = None
    test: Accuracy | None = None
    shifts: dict[str, Accuracy] = Field(default_factory=dict)

    @property
    def shift_average(self) -> float | None:
        """Plain mean over suites, as a fraction; None without suites."""
        return sum(score.value for score in self.shifts.values()) / len(self.shifts) if self.shifts else None


class TrialPoint(Closed):
    """One trial in the picture: held-out accuracy against shift average."""

    trial_id: str
    index: int
    scores: Scores
    kept: bool


class AlphaPoint(Closed):
    """One place on the line from the init (0) to a model (1)."""

    alpha: float
    scores: Scores


class ClassChange(Closed):
    """One class on the gate split: right answers of the best single model and of the shipped soup."""

    name: str
    seen: int
    single: int
    soup: int


class Cost(Closed):
    """What making and scoring one recipe took, beyond what was known before it."""

    samples: int = Field(description="Forward passes of one sample, as many as one device alone takes.")
    speculated: int = Field(0, description="Passes beside them, on devices that were idle, for candidates nobody asked about in the end.")
    seconds: float
    peak_bytes: int | None = Field(description="Most memory resident during it, or on a GPU allocated there; None where nobody counts it.")


class Calibration(Closed):
    """Expected calibration error on the gate split, and what one temperature, fitted on held_out, makes of it."""

    before: float
    after: float
    temperature: float


class MarginalPoint(Closed):
    """The greedy soup of a sweep's first trials, and what the trials since the point before brought."""

    trials: int = Field(gt=0, description="How many it could choose from, in the order they were drawn.")
    held_out: Accuracy
    accelerator_hours: float = Field(description="What these trials took together: each its hours times its accelerators.")
    gain_per_trial: float | None = Field(description="Accuracy, as a fraction, over the point before; None at the first.")
    gain_per_hour: float | None = Field(description="The same per hour of an accelerator.")


class ModelVersion(Closed):
    """A version in the registry, with the alias the gate gave it."""

    model: str
    version: int
    alias: str | None = None
    soup_sha256: str

    @property
    def ingredient_id(self) -> str:
        """The id its soup has as an ingredient of another, beside those of trials."""
        return soup_id(self.soup_sha256)


class Enough(Closed):
    """Why a sweep starts no further trial, and the evidence."""

    rule: StopSpec = Field(description="The request's; another one in the request asks again.")
    expected_gain: float = Field(description="Of one more trial: held-out accuracy, as a fraction.")
    curve: tuple[MarginalPoint, ...] = Field(
        min_length=2, description="What it was estimated from; the last point is of all finished trials."
    )

    @property
    def reason(self) -> str:
        """One sentence."""
        return (
            f"After {self.curve[-1].trials} finished trials one more is expected to add {100 * self.expected_gain:.3f} points on "
            f"held_out; the request stops below {100 * self.rule.below:g}."
        )


class Borrowed(Closed):
    """An ingredient of another model, whose body joined under this init's head."""

    model: str
    weights_sha256: str = Field(description="Of its body and this init's head together.")


class SoupReport(Closed):
    """Everything a person or the gate needs to know of one cooked sweep."""

    sweep_id: str
    model: str
    mlflow_run_id: str
    recipe: str
    metric: Metric = Field("accuracy", description="What ingredients were ranked by; every score is of it.")
    model_id: str = Field("", description="MLflow LoggedModel that holds the shipped soup, as it is served.")
    soup_sha256: str = Field(description="sha256 of the shipped soup's safetensors file: the identity of the model version.")
    data: PinnedData | None = Field(None, description="What was read. None in a report of an earlier Stockpot; its sweep says it too.")
    init_digest: str
    transform_digest: str
    best_single: str = Field(description="Trial id of the highest held-out accuracy; ties go to the smaller id.")
    ingredients: tuple[str, ...] = Field(description="Trial ids in the shipped soup, in the order they were added.")
    shares: dict[str, tuple[float, ...]] = Field(
        default_factory=dict, description="Of a learned mixture: layer to the weight of each ingredient. Empty for a plain mean."
    )
    alpha: float | None = Field(None, description="Of the recipe `wise_ft`: the greedy soup's share, the rest is the init.")
    batch_norm_samples: int | None = Field(
        None, description="Training samples that BatchNorm statistics were estimated on again, everywhere here; None: they were averaged."
    )
    steps: tuple[GreedyStep, ...]
    scores: dict[str, Scores] = Field(
        description="Under `best_single`, `uniform` and `greedy`, and what the request asked to compare. Learned mixing has its held_out "
        "score on the samples it was not fitted on."
    )
    unfitted: dict[str, Accuracy] = Field(
        default_factory=dict,
        description="Where learned mixing is shown: held_out accuracy of it, and of what it is compared with, on the samples that it was "
        "not fitted on.",
    )
    alphas: dict[str, tuple[AlphaPoint, ...]] = Field(
        default_factory=dict,
        description="`best_single`, `uniform` and `greedy` interpolated with the init, if the request asked for `wise_ft`.",
    )
    angles: dict[str, tuple[float, ...]] = Field(
        default_factory=dict, description="Trial id to its angles with every trial of `trials`, seen from the init, in degrees."
    )
    costs: dict[str, Cost] = Field(default_factory=dict, description="By recipe, in the order they were made.")
    calibration: dict[str, Calibration] = Field(default_factory=dict, description="By recipe.")
    midpoints: dict[str, Accuracy] = Field(
        default_factory=dict, description="Trial id to the held-out accuracy half way between it and the best single, if asked for."
    )
    duplicates: tuple[tuple[str, ...], ...] = Field(
        (), description="Trial ids with the same weights to the bit; each counts as often as named."
    )
    trials: tuple[TrialPoint, ...]
    classes: tuple[ClassChange, ...] = Field((), description="On the gate split, in the order of the labels.")
    excluded: dict[str, str] = Field(default_factory=dict, description="Trial id to the reason it was left out.")
    origins: dict[str, str] = Field(default_factory=dict, description="Ingredients from elsewhere that joined, to the sweep of each.")
    borrowed: dict[str, Borrowed] = Field(default_factory=dict, description="Ingredients of other models that joined, by their ids.")
    champion: ModelVersion | None = Field(None, description="The version that joined as `ingredient_id`; its alias is of that moment.")
    marginal: tuple[MarginalPoint, ...] = Field((), description="The greedy soup against the number of trials, if asked for.")
    versions: dict[str, str] = Field(
        default_factory=dict, description="What cooked it: stockpot, python, torch and what else decides bits."
    )
    dtype: str = Field("", description="Of the shipped weights.")
    seconds: float = 0.0

    def held_out(self, *names: str) -> tuple[Accuracy, ...]:
        """Of several recipes on the same samples: all of held_out, or where one of them was fitted on some, the rest, if all are known
        there."""
        scores = tuple(self.scores[name].held_out for name in names)
        alike = len({one.seen for one in scores}) == 1
        return scores if alike else tuple(self.unfitted.get(name, one) for name, one in zip(names, scores, strict=True))


class VersionSummary(Closed):
    """One line about a registered version, for a list of them."""

    model: str
    version: int
    aliases: tuple[str, ...] = Field(description="All of them, a person's own ones too.")
    sweep_id: str
    recipe: str
    ingredients: tuple[str, ...] = Field(description="Ids of what was averaged, in the order it was added.")
    scores: Scores | None = Field(
        description="None for a version registered before they were kept with it, or by rules of another Stockpot."
    )
    registered: str = Field(description="ISO 8601, UTC.")


class Paired(Closed):
    """Champion and challenger on the same samples, and what the difference is worth."""

    champion: Accuracy
    challenger: Accuracy
    p_value: float = Field(description="Exact McNemar, two-sided.")
    interval: tuple[float, float] = Field(description="95 % paired bootstrap interval of the accuracy gained, as fractions.")
    tolerance: float = Field(description="Largest loss of accuracy that passes, as a fraction.")

    @property
    def gain(self) -> float:
        """What the challenger gains, as a fraction; negative is a loss."""
        if self.champion.other is not None:
            return self.challenger.value - self.champion.value
        return (self.challenger.correct - self.champion.correct) / self.champion.seen


class GateDecision(Closed):
    """Whether a challenger became champion, why, and the numbers behind it."""

    promoted: bool
    reason: str
    waits: bool = Field(False, description="Passed, and a person must approve: see `stockpot.release.releasing.settle`.")
    gate_digest: str = Field("", description="Of the request's `gate` it was judged by; another gate judges again.")
    evidence: str = Field("", description="Where the evidence it follows from is stored; empty where nothing was measured.")
    evidence_sha256: str = Field("", description="Of that file.")
    champion_before: int | None = None
    gate: Paired | None = Field(None, description="On the gate split.")
    shifts: dict[str, Paired] = Field(default_factory=dict, description="On every shift suite.")
    calibration_error: dict[str, float] = Field(default_factory=dict, description="Expected calibration error on the gate split, by side.")
    latency_ratio: float | None = Field(None, description="Time for one image, challenger over champion: median of paired measurements.")
    size_ratio: float | None = Field(None, description="Bytes of the weights, challenger over champion.")
