"""From a cooked soup to an alias: register once, compare with the champion on samples nothing was selected on, move the
alias, read it back.

Every step can be interrupted and run again: the version is found by its weights, the decision is stored with it before any alias
moves, and a stored decision is carried out, not taken again.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from stockpot import registry, tracking
from stockpot.checkpoints import load_weights
from stockpot.config import GateSpec, PinnedSnapshot, Sweep
from stockpot.evaluation import accuracy, logits
from stockpot.models import ModelConfig, build, load_state
from stockpot.outcomes import Accuracy, GateDecision, ModelVersion, SoupReport
from stockpot.shards import pixels
from stockpot.snapshots import open_snapshot
from stockpot.statistics import mcnemar, right

# N samples, C classes


def register(report: SoupReport) -> ModelVersion:
    """The soup's version: found by its weights, or created, then downloaded again and compared with the sha256. Raises `RegistryError`."""
    tags = {
        "stockpot.sweep": report.sweep_id,
        "stockpot.recipe": report.recipe,
        "stockpot.init": report.init_digest,
        "stockpot.transform": report.transform_digest,
        "stockpot.ingredients": ",".join(report.ingredients),
    }
    card = tracking.read_report_text(report, "card.md")
    version = registry.register_once(report.model, report.model_id, report.soup_sha256, report.mlflow_run_id, tags, card)
    with TemporaryDirectory(prefix="stockpot-readback-") as folder:
        registry.fetch_version(version, Path(folder))
    return version


def gate(report: SoupReport, version: ModelVersion, spec: GateSpec) -> GateDecision:
    """Judge a version against the champion and move the aliases; the same again gives the same. Raises `RegistryError`."""
    decision = registry.read_decision(version)
    if decision is None:
        decision = _decide(tracking.read_sweep(report.sweep_id), version, spec)
        registry.write_tag(version, "stockpot.decision", decision.model_dump_json())
    if "stockpot.settled" not in registry.read_tags(version):
        _move_aliases(version, decision)
        registry.write_tag(version, "stockpot.settled", "yes")
    return decision


def judge(gate: dict[str, Accuracy], shifts: dict[str, dict[str, Accuracy]], p_value: float, spec: GateSpec) -> tuple[bool, str]:
    """The rule alone: no loss on the gate split or any suite above its tolerance. Returns the verdict and its reason."""
    loss = _loss(gate)
    told = f"gate split: challenger {_percent(gate['challenger'])}, champion {_percent(gate['champion'])}, exact McNemar p = {p_value:.3g}"
    if loss > spec.gate_tolerance + 1e-9:
        return False, f"Stays challenger: it loses {100 * loss:.2f} points, {100 * spec.gate_tolerance:.2f} are tolerated ({told})."
    for name, pair in shifts.items():
        if (loss := _loss(pair)) > spec.shift_tolerance + 1e-9:
            return False, (
                f"Stays challenger: it loses {100 * loss:.2f} points on shift suite {name}, {100 * spec.shift_tolerance:.2f} are tolerated "
                f"({_percent(pair['challenger'])} against {_percent(pair['champion'])}; {told})."
            )
    return True, f"Promoted: no loss above the tolerances ({told})."


def _decide(sweep: Sweep, version: ModelVersion, spec: GateSpec) -> GateDecision:
    champion = registry.alias_version(version.model, "champion")
    if champion is None:
        return GateDecision(promoted=True, reason="Promoted: the first version of this model.")
    if champion == version.version:
        return GateDecision(promoted=True, reason="It is the champion already.", champion_before=champion)
    with TemporaryDirectory(prefix="stockpot-gate-") as scratch:
        folders = {
            "champion": registry.fetch_version(registry.read_version(version.model, champion), Path(scratch) / "champion"),
            "challenger": registry.fetch_version(version, Path(scratch) / "challenger"),
        }
        configs = {name: ModelConfig.model_validate_json((folder / "model.json").read_bytes()) for name, folder in folders.items()}
        if refused := _incomparable(configs):
            return GateDecision(promoted=False, reason=refused, champion_before=champion)
        sides = {name: _scorer(configs[name], folder) for name, folder in folders.items()}
    return _compare(sweep, sides, spec, champion)


Scorer = Callable[[PinnedSnapshot, str], tuple[Tensor, Tensor]]
"""(snapshot, split) -> logits (N, C) and labels (N,)."""


def _scorer(config: ModelConfig, folder: Path) -> Scorer:
    model = build(config)
    load_state(model, load_weights(folder / "model.safetensors"))
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def score(snapshot: PinnedSnapshot, split: str) -> tuple[Tensor, Tensor]:
        seen = pixels(open_snapshot(snapshot), split, config.preprocess)
        return logits(model, seen.images, config.preprocess, device=device), torch.as_tensor(seen.labels)

    return score


def _compare(sweep: Sweep, sides: dict[str, Scorer], spec: GateSpec, champion: int) -> GateDecision:
    answers = {name: score(sweep.data.snapshot, "gate") for name, score in sides.items()}
    p_value = mcnemar(right(*answers["champion"]), right(*answers["challenger"]))
    on_gate = {name: accuracy(*answer) for name, answer in answers.items()}
    shifts = {
        suite: {name: accuracy(*score(snapshot, "test")) for name, score in sides.items()} for suite, snapshot in sweep.data.shifts.items()
    }
    promoted, reason = judge(on_gate, shifts, p_value, spec)
    return GateDecision(promoted=promoted, reason=reason, champion_before=champion, gate=on_gate, p_value=p_value, shifts=shifts)


def _incomparable(configs: dict[str, ModelConfig]) -> str | None:
    """Why two models may not be compared on one set of pixels and labels; None when they may."""
    champion, challenger = configs["champion"], configs["challenger"]
    if champion.classes != challenger.classes:
        other = "knows other classes"
    elif champion.preprocess != challenger.preprocess:
        other = "sees images prepared another way"
    else:
        return None
    return f"Stays challenger: the champion {other}, so no comparison is fair; promote it by hand if the change is meant."


def _move_aliases(version: ModelVersion, decision: GateDecision) -> None:
    model, number = version.model, version.version
    if not decision.promoted:
        registry.set_alias(model, "challenger", number)
        return
    champion = registry.alias_version(model, "champion")
    if champion not in (None, number):
        registry.set_alias(model, "previous", champion)
    registry.set_alias(model, "champion", number)
    if registry.alias_version(model, "challenger") == number:
        registry.set_alias(model, "challenger", None)


def _loss(pair: dict[str, Accuracy]) -> float:
    return (pair["champion"].correct - pair["challenger"].correct) / pair["champion"].seen


def _percent(score: Accuracy) -> str:
    return f"{100 * score.value:.2f} % ({score.correct} of {score.seen})"
