"""From a cooked soup to an alias: register once, pass the gate, move the aliases, read them back; and by hand: promote, roll back.

Every step can be interrupted and run again: the version is found by its weights, the decision is stored with it before any alias moves,
and a stored decision is carried out, not taken again, unless the request's gate is another one or the champion it was judged against is
no longer champion. A move of the aliases is noted first and finished by whoever comes next: `crowning`.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from stockpot.config import GateSpec
from stockpot.digests import digest, text_digest
from stockpot.errors import RegistryError
from stockpot.ledger import packaging, registry, tracking
from stockpot.ledger.limits import DESCRIPTION, shortened
from stockpot.outcomes import GateDecision, ModelVersion, SoupReport
from stockpot.release.crowning import DECLINED, alone, answer, crown, note_settled, resume, settled_under, verify
from stockpot.release.gating import gather_evidence
from stockpot.release.judging import Judgement, Side, judge, replay
from stockpot.soup import card

PROMOTED, ROLLED_BACK = "promoted by hand", "rolled back by hand"


def register(report: SoupReport) -> ModelVersion:
    """The soup's version: found by its weights, or created; then downloaded again, compared with the sha256, and loaded and asked as a
    service would. Raises `RegistryError`."""
    tags = {
        "stockpot.sweep": report.sweep_id,
        "stockpot.recipe": report.recipe,
        "stockpot.init": report.init_digest,
        "stockpot.transform": report.transform_digest,
        "stockpot.ingredients": ",".join(report.ingredients),
        "stockpot.scores": report.scores[report.recipe].model_dump_json(),
    }
    told = card.write(report)
    described = shortened(told, DESCRIPTION, f"The whole card is `{_place(report)}/card.md` of MLflow run {report.mlflow_run_id}.")
    with alone(report.model):
        version = registry.register_once(report.model, report.model_id, report.soup_sha256, report.mlflow_run_id, tags, described)
        if "stockpot.record" not in registry.read_tags(version):
            _keep_record(report, version, {"report.json": report.model_dump_json(indent=1), "card.md": told})
    verify(version, packaging.try_out)
    return version


def read_record(version: ModelVersion, name: Literal["report.json", "card.md"]) -> str:
    """A file as it was when the version was registered. Raises `RegistryError` when it was changed."""
    tags = registry.read_tags(version)
    if "stockpot.record" not in tags:
        raise RegistryError(f"{version.model} version {version.version} has no record of its soup; it was not made by Stockpot's `soup`.")
    record = json.loads(tags["stockpot.record"])
    text = tracking.read_text(record["mlflow_run_id"], f"{_place(version)}/{name}")
    if text_digest(text) != record["sha256"][name]:
        raise RegistryError(
            f"`{name}` of {version.model} version {version.version} is not what was registered; the record was changed: restore the file, "
            f"or delete the version and register its soup again with `stockpot soup {tags['stockpot.sweep']}`."
        )
    return text


def gate(report: SoupReport, version: ModelVersion, spec: GateSpec) -> GateDecision:
    """Judge a version against the champion and move the aliases; the same again gives the same. Raises `RegistryError`.

    The decision is a tag of the version, `stockpot.decision`, which names the file of the soup's run that holds it with its evidence. One
    that was carried out stands, whatever a person did to the aliases since, and under any gate while the version is champion; the tag
    `stockpot.settled` says under which.
    """
    asked = digest(spec)
    with alone(version.model):
        resume(version.model)
        decision, champion = registry.read_decision(version), registry.alias_version(version.model, "champion")
        if decision is None or not _stands(decision, version, champion, asked):
            decision = _decide(report, version, champion, spec)
            if answer(version):
                registry.write_tag(version, "stockpot.approval", "")  # it was about another decision
            registry.write_tag(version, "stockpot.decision", decision.model_dump_json())
        if asked not in settled_under(version):
            _carry_out(version, decision, champion)
            note_settled(version, asked)
    return decision


def _stands(decision: GateDecision, version: ModelVersion, champion: int | None, asked: str) -> bool:
    """Whether a stored decision answers this gate: it is settled, about the champion, or still to be carried out against the same one."""
    if champion == version.version or asked in settled_under(version):
        return True
    return decision.gate_digest == asked and decision.champion_before == champion


def settle(version: ModelVersion, approved: bool, note: str = "") -> ModelVersion:
    """What a person answered about a version that passed the gate and waits: promote it, or leave it challenger. The answer becomes the tag
    `stockpot.approval`. Raises `RegistryError` when it does not wait, was judged against a champion that is champion no longer, or is to be
    declined and was promoted meanwhile."""
    with alone(version.model):
        resume(version.model)
        decision = registry.read_decision(version)
        if decision is None or not decision.waits:
            reason = decision.reason if decision else "it was never judged"
            raise RegistryError(
                f"Version {version.version} of {version.model} does not wait for approval ({reason}); there is nothing to do."
            )
        told = f"{'approved by hand' if approved else DECLINED}{f': {note}' if note else ''}"
        if approved and (said := answer(version)) and not said.startswith(DECLINED):
            return registry.read_version(version.model, version.version)  # and a person may have taken it back since
        if not approved and registry.alias_version(version.model, "champion") == version.version:
            raise RegistryError(
                f"Version {version.version} of {version.model} is champion already, so there is nothing left to decline; "
                f"`stockpot rollback {version.model}` takes it back."
            )
        if approved:
            crown(version.model, version.version, told, decision.champion_before)
        registry.write_tag(version, "stockpot.approval", told)
        return registry.read_version(version.model, version.version)


def read_judgement(version: ModelVersion) -> Judgement | None:
    """The stored decision with its evidence, taken again from it; None where there is none. Raises `RegistryError` when they disagree."""
    stored = registry.read_decision(version)
    if stored is None or not stored.evidence:
        return None
    mlflow_run_id, _, name = stored.evidence.removeprefix("runs:/").partition("/")
    text = tracking.read_text(mlflow_run_id, name)
    if text_digest(text) != stored.evidence_sha256:
        raise RegistryError(
            f"The gate's evidence for {version.model} version {version.version} (`{name}`) is not what was stored; the record was changed: "
            "restore the file, or delete the version's tag `stockpot.decision`, and `stockpot soup SWEEP` judges it again."
        )
    judgement = replay(text)
    if judgement.decision != stored.model_copy(update={"evidence": "", "evidence_sha256": ""}):
        raise RegistryError(
            f"The tag `stockpot.decision` of {version.model} version {version.version} ({stored.reason}) is not what follows from its "
            f"evidence ({judgement.decision.reason}); it was changed: delete it, and `stockpot soup SWEEP` judges the version again."
        )
    return judgement


def promote(model: str, number: int | None = None) -> ModelVersion:
    """Make a version champion by hand, the challenger when no number is given; the champion becomes `previous`. An interrupted promotion is
    finished by the same again. Raises `RegistryError`."""
    with alone(model):
        if (done := _resumed(model, PROMOTED)) and number in (None, done.version):
            return done
        wanted = number if number is not None else registry.alias_version(model, "challenger")
        if wanted is None:
            raise registry.no_version(model, "challenger")
        return crown(model, wanted, PROMOTED, registry.alias_version(model, "champion"))


def rollback(model: str) -> ModelVersion:
    """Make the previous champion champion again; a second rollback takes it back, and one after an interrupted rollback finishes that.
    Raises `RegistryError` when there is none."""
    with alone(model):
        if done := _resumed(model, ROLLED_BACK):
            return done
        previous = registry.alias_version(model, "previous")
        if previous is None:
            raise registry.no_version(model, "previous")
        return crown(model, previous, ROLLED_BACK, registry.alias_version(model, "champion"))


def _resumed(model: str, why: str) -> ModelVersion | None:
    """The champion that an interrupted move made, where it was this one; any other is finished too, and is no answer."""
    move = resume(model)
    return registry.read_version(model, move.after) if move and move.why == why else None


def _keep_record(report: SoupReport, version: ModelVersion, files: dict[str, str]) -> None:
    """The version's own copy: its sweep may be cooked again, and another sweep may come to the same soup."""
    for name, text in files.items():
        tracking.store_text(report.mlflow_run_id, f"{_place(version)}/{name}", text)
    record = {"mlflow_run_id": report.mlflow_run_id, "sha256": {name: text_digest(text) for name, text in files.items()}}
    registry.write_tag(version, "stockpot.record", json.dumps(record))


def _decide(report: SoupReport, version: ModelVersion, champion: int | None, spec: GateSpec) -> GateDecision:
    if champion == version.version:
        return GateDecision(promoted=True, reason="It is the champion already.", gate_digest=digest(spec), champion_before=champion)
    versions: dict[Side, ModelVersion] = {"challenger": version}
    if champion is not None:
        versions["champion"] = registry.read_version(version.model, champion)
    with TemporaryDirectory(prefix="stockpot-gate-") as scratch:
        folders = {side: registry.fetch_version(one, Path(scratch) / side) for side, one in versions.items()}
        evidence = gather_evidence(tracking.read_sweep(report.sweep_id), versions, folders, spec)
    decision = judge(evidence)
    text = Judgement(decision=decision, evidence=evidence).model_dump_json(indent=1)
    sha256 = text_digest(text)
    name = f"{_place(version)}/gate-against-{champion or 'none'}-{sha256[:12]}.json"
    tracking.store_text(report.mlflow_run_id, name, text)
    return decision.model_copy(update={"evidence": f"runs:/{report.mlflow_run_id}/{name}", "evidence_sha256": sha256})


def _place(version: ModelVersion | SoupReport) -> str:
    """Where a version's record lies on its soup's run."""
    return f"versions/{version.soup_sha256[:12]}"


def _carry_out(version: ModelVersion, decision: GateDecision, champion: int | None) -> None:
    if decision.promoted or champion == version.version:
        crown(version.model, version.version, decision.reason, decision.champion_before)
    else:
        registry.set_alias(version.model, "challenger", version.version)
