"""From a cooked soup to an alias: register once, pass the gate, move the aliases, read them back; and by hand: promote, roll back.

Every step can be interrupted and run again: the version is found by its weights, the decision is stored with it before any alias
moves, and a stored decision is carried out, not taken again, unless the champion it was judged against is no longer champion.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from stockpot.config import GateSpec, Sweep
from stockpot.data.node_cache import cache_root, locked
from stockpot.ledger import registry, tracking
from stockpot.outcomes import GateDecision, ModelVersion, SoupReport
from stockpot.release.gating import Side, gather_evidence, incomparable, judge, read_config


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
    with _alone(report.model):
        version = registry.register_once(report.model, report.model_id, report.soup_sha256, report.mlflow_run_id, tags, card)
    _verify(version)
    return version


def gate(report: SoupReport, version: ModelVersion, spec: GateSpec) -> GateDecision:
    """Judge a version against the champion and move the aliases; the same again gives the same. Raises `RegistryError`.

    The evidence is stored as `gate.json` on the soup's run, the decision as a tag of the version.
    """
    with _alone(version.model):
        tags = registry.read_tags(version)
        decision = registry.read_decision(version)
        champion = registry.alias_version(version.model, "champion")
        valid = "stockpot.settled" in tags or (decision and champion in (decision.champion_before, version.version))
        if decision is None or not valid:
            decision = _decide(tracking.read_sweep(report.sweep_id), report, version, spec)
            registry.write_tag(version, "stockpot.decision", decision.model_dump_json())
        if "stockpot.settled" not in tags:
            _move_aliases(version, decision)
            registry.write_tag(version, "stockpot.settled", "yes")
    return decision


def promote(model: str, number: int | None = None) -> ModelVersion:
    """Make a version champion by hand, the challenger when no number is given; the champion becomes `previous`. Raises `RegistryError`."""
    with _alone(model):
        wanted = number if number is not None else registry.alias_version(model, "challenger")
        if wanted is None:
            raise registry.no_version(model, "challenger")
        return _crown(model, wanted, "promoted by hand")


def rollback(model: str) -> ModelVersion:
    """Make the previous champion champion again; a second rollback takes it back. Raises `RegistryError` when there is none."""
    with _alone(model):
        previous = registry.alias_version(model, "previous")
        if previous is None:
            raise registry.no_version(model, "previous")
        return _crown(model, previous, "rolled back by hand")


def _decide(sweep: Sweep, report: SoupReport, version: ModelVersion, spec: GateSpec) -> GateDecision:
    champion = registry.alias_version(version.model, "champion")
    if champion is None:
        return GateDecision(promoted=True, reason="Promoted: the first version of this model.")
    if champion == version.version:
        return GateDecision(promoted=True, reason="It is the champion already.", champion_before=champion)
    rival = registry.read_version(version.model, champion)
    with TemporaryDirectory(prefix="stockpot-gate-") as scratch:
        folders: dict[Side, Path] = {
            "champion": registry.fetch_version(rival, Path(scratch) / "champion"),
            "challenger": registry.fetch_version(version, Path(scratch) / "challenger"),
        }
        if refused := incomparable(read_config(folders["champion"]), read_config(folders["challenger"])):
            return GateDecision(promoted=False, reason=refused, champion_before=champion)
        sha256: dict[Side, str] = {"champion": rival.soup_sha256, "challenger": version.soup_sha256}
        evidence = gather_evidence(sweep, folders, {"champion": champion, "challenger": version.version}, sha256, spec)
    tracking.store_text(report.mlflow_run_id, "gate.json", evidence.model_dump_json(indent=1))
    return judge(evidence)


def _move_aliases(version: ModelVersion, decision: GateDecision) -> None:
    if decision.promoted:
        _crown(version.model, version.version, decision.reason)
    else:
        registry.set_alias(version.model, "challenger", version.version)


def _crown(model: str, number: int, why: str) -> ModelVersion:
    """Champion to `previous`, `number` to champion, and off the challengers' bench. A version whose bytes changed is refused."""
    version = registry.read_version(model, number)
    _verify(version)
    champion = registry.alias_version(model, "champion")
    if champion not in (None, number):
        registry.set_alias(model, "previous", champion)
    if champion != number:
        registry.set_alias(model, "champion", number)
        registry.note_change(model, champion, number, why)
    if registry.alias_version(model, "challenger") == number:
        registry.set_alias(model, "challenger", None)
    return registry.read_version(model, number)


def _verify(version: ModelVersion) -> None:
    """Download a version and compare its weights with what was registered."""
    with TemporaryDirectory(prefix="stockpot-readback-") as folder:
        registry.fetch_version(version, Path(folder))


@contextmanager
def _alone(model: str) -> Iterator[None]:
    """One writer of a model's aliases on this node; writers on other nodes are noticed by reading back."""
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f"registry-{model}.lock"):
        yield
