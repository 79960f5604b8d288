"""A registered version, told to a person, and rebuilt from its ingredients: `stockpot explain` and `stockpot reproduce`."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torch import Tensor

from stockpot.checkpoints import save_weights
from stockpot.errors import RegistryError
from stockpot.fields import Closed
from stockpot.ledger import champions, registry, tracking
from stockpot.ledger.records import parsed
from stockpot.models.classifier import build
from stockpot.models.folders import read_model
from stockpot.models.loading import load_state
from stockpot.outcomes import GateDecision, ModelVersion, SoupReport, TrialPoint
from stockpot.release import crowning, releasing
from stockpot.soup import card, table
from stockpot.soup.rebuilding import FROM_INIT, rebuild
from stockpot.soup.recipes.batch_norm import statistics
from stockpot.soup.score_cache import ARITHMETIC
from stockpot.soup.settling import settle, settling_samples
from stockpot.soup.soupability import open_init
from stockpot.soup.stored_mean import Source, is_plain_mean, sources, stored_mean

NEAR = 1e-3
"""Largest difference of a BatchNorm statistic, as a share of its tensor's largest, that two machines may have."""


class Story(Closed):
    """What the ledger knows of a version, read once."""

    version: ModelVersion
    decision: GateDecision | None
    gone: tuple[str, ...]
    """Ingredients it has no longer."""
    report: SoupReport


class Reproduced(NamedTuple):
    """A version that was made again, and is the same."""

    version: ModelVersion
    how: str
    """What was compared, and how exactly, as a sentence."""


def look_up(name: str) -> Story:
    """Raises `RegistryError`, `RecordUnreadable`.

    name: `digits` (its champion), `digits@previous` or `digits/3`.
    """
    version = registry.resolve(name)
    report = read_report(version)
    return Story(version=version, decision=registry.read_decision(version), gone=gone(report, sources(report)), report=report)


def explain(name: str) -> str:
    """`tell` of what is looked up by this name."""
    return tell(look_up(name))


def tell(story: Story) -> str:
    """Where a version comes from, what was decided on the way, and how to act on it. Raises `RegistryError` for changed evidence."""
    version, report = story.version, story.report
    parts = [
        f"{version.model} version {version.version}{f' is {version.alias}' if version.alias else ' has no alias'}.",
        card.verdict(report),
        _made_of(report),
        "\n".join(["Recipes and yardsticks of the sweep:", table.text(report), *table.notes(report)]),
        "\n".join(["Near misses:", *[f"  {line}" for line in near]]) if (near := card.near_misses(report)) else "",
        _gate(version, story.decision),
        _history(version),
        f"Weights: sha256 {version.soup_sha256}. {_rebuildable(story)}",
        f"The whole report: {tracking.report_page(report)}",
    ]
    return "\n\n".join(part for part in parts if part)


def reproduce(name: str) -> Reproduced:
    """Average the version's ingredients again, from the ledger, and compare the sha256 of the result with the registered one; and compare
    every file of the version, its card, its report and the gate's evidence with the digests taken when they were made.

    Returns when all are equal. Raises `RegistryError` when they are not, and `IngredientMismatch` for a changed ingredient.
    """
    version = registry.resolve(name)
    report = read_report(version)
    releasing.read_record(version, "card.md")
    judged = releasing.read_judgement(version) is not None
    left = sources(report)
    if lost := gone(report, left):
        raise RegistryError(_cannot_be_rebuilt(version, lost))
    with TemporaryDirectory(prefix="stockpot-reproduce-") as scratch:
        folder = Path(scratch)
        found = stored_mean(report, left, folder) if is_plain_mean(report) else _rebuilt(report, left, folder)
        registered = registry.fetch_version(version, folder / "registered")
        if report.batch_norm_samples:
            _compare_statistics(report, found, registered)
        elif save_weights(folder / "soup.safetensors", found) != version.soup_sha256:
            raise _another(report, "another sha256")
    return Reproduced(version, _compared(report, judged))


def gone(report: SoupReport, left: Mapping[str, Source]) -> tuple[str, ...]:
    """The ingredients of a soup that are not among those `left` in the ledger."""
    return tuple(trial for trial in dict.fromkeys(report.ingredients) if trial not in left)


def _rebuildable(story: Story) -> str:
    if story.gone:
        return _cannot_be_rebuilt(story.version, story.gone)
    return f"Rebuild and compare them with `stockpot reproduce {story.version.model}/{story.version.version}`."


def _cannot_be_rebuilt(version: ModelVersion, lost: Sequence[str]) -> str:
    return (
        f"{version.model} version {version.version} can no longer be rebuilt: of its ingredients {', '.join(lost)} "
        f"{'is' if len(lost) == 1 else 'are'} gone from the ledger, as `stockpot prune` takes those of versions without an alias; the "
        "version itself is whole and serves as before."
    )


def _rebuilt(report: SoupReport, left: Mapping[str, Source], folder: Path) -> dict[str, Tensor]:
    """The soup's weights from its ingredients, and from the init where the recipe takes it; BatchNorm statistics as averaged."""
    with ExitStack() as stack:
        files = {trial: stack.enter_context(closing(one.open(folder))) for trial, one in left.items()}
        start = None
        if report.recipe in FROM_INIT:
            start = stack.enter_context(closing(open_init(tracking.read_sweep(report.sweep_id).init, folder)[0]))
        return rebuild(report, files, start)


def _compared(report: SoupReport, judged: bool) -> str:
    how = "The weights were compared to the bit"
    if report.batch_norm_samples:
        how = (
            "The weights were compared to the bit, but for BatchNorm's statistics: estimated again on "
            f"{report.batch_norm_samples} training samples, they may differ by {NEAR:g} of the largest of their tensor"
        )
    record = "report, card and gate evidence" if judged else "report and card"
    return f"{how}; every file of the version and of its ingredients, and its {record}, by the sha256 recorded of each."


def _compare_statistics(report: SoupReport, averaged: dict[str, Tensor], registered: Path) -> None:
    """A soup whose BatchNorm statistics were estimated again: these take forward passes, whose last bits are a machine's own, so they may
    differ by `NEAR` of their largest; everything else must be equal to the bit. Raises `RegistryError`."""
    wanted, sweep = read_model(registered), tracking.read_sweep(report.sweep_id)
    model = build(wanted.config)
    load_state(model, averaged)
    settle(model, settling_samples(sweep, wanted.config.preprocess))
    names, state = statistics(model), wanted.state_dict()
    for name, tensor in model.state_dict().items():
        apart = float((tensor.double() - state[name].double()).abs().max())
        if apart > (NEAR * float(state[name].double().abs().max()) if name in names else 0):
            raise _another(report, f"another `{name}`, by {apart:.1e}")


def _another(report: SoupReport, what: str) -> RegistryError:
    how = report.versions.get("averaging")
    why = "the record and the weights disagree" if how == ARITHMETIC else f"it was averaged another way ({how or 'not recorded'})"
    return RegistryError(
        f"The {len(report.ingredients)} ingredients of soup {report.soup_sha256[:12]} of {report.model} give {what} than was registered; "
        f"{why}: cook the sweep again (`stockpot soup {report.sweep_id}`)."
    )


def read_report(version: ModelVersion) -> SoupReport:
    """The report a version was registered from. Raises `RegistryError` for a version Stockpot did not make, and for a changed record;
    `RecordUnreadable`."""
    return parsed(SoupReport, releasing.read_record(version, "report.json"), f"The report of {version.model} version {version.version}")


def _made_of(report: SoupReport) -> str:
    by_id = {point.trial_id: point for point in report.trials}
    read = f", on snapshot {report.data.snapshot.digest[:12]}" if report.data else ""
    lines = [f"Recipe {report.recipe}, sweep {report.sweep_id}, from init {report.init_digest[:12]}{read}:"]
    for trial in report.ingredients:
        score = by_id[trial].scores.held_out
        lines.append(f"  {_name(report, by_id[trial])}  held_out {100 * score.value:.2f} % ({score.told}) on its own")
    left_out = len(report.trials) - len(set(report.ingredients))
    return "\n".join([*lines, f"  left out by the recipe: {left_out}; unfit: {len(report.excluded)}"])


def _name(report: SoupReport, point: TrialPoint) -> str:
    if report.champion and point.trial_id == report.champion.ingredient_id:
        return f"champion   {point.trial_id}, which was version {report.champion.version}"
    origin, borrowed = report.origins.get(point.trial_id), report.borrowed.get(point.trial_id)
    lender = f" of {borrowed.model}, its body under this init's head" if borrowed else ""
    return f"trial {point.index:3d}  {point.trial_id}" + (f" of sweep {origin}{lender}" if origin else "")


def _gate(version: ModelVersion, decision: GateDecision | None) -> str:
    judgement = releasing.read_judgement(version)
    if decision is None:
        return "Gate: not judged yet."
    told = crowning.answer(version)
    asked = f" It was {told}." if told else " Nobody has answered yet." if decision.waits else ""
    follows = f"follows again from its evidence, {decision.evidence}" if judgement else "cannot be taken again: it names no evidence"
    return f"Gate: {decision.reason}{asked}\n  The verdict {follows}."


def _history(version: ModelVersion) -> str:
    history = champions.read_history(version.model)[-5:]
    lines = [f"  {one['when']}  {one['before'] or 'none'} -> {one['after']}  {one['why'].split('(')[0].strip()}" for one in history]
    earlier = history[0].get("number", 1) - 1 if history else 0
    return "\n".join([f"Champions so far{f', after {earlier} earlier changes' if earlier else ''}:", *lines]) if lines else ""
