"""Sweeps, trials and soups as text for a person and as documents for a program, both read from the ledger."""

from typing import Any

from rich.console import Console
from rich.table import Table

from stockpot.outcomes import Enough, ModelVersion, SoupReport, VersionSummary
from stockpot.soup import table as soup_table


def sweep_document(sweep_id: str) -> dict[str, Any]:
    """One sweep: its trials with accuracies, its soup with scores, its version. Raises `SweepMissing`."""
    from stockpot.ledger import registry, tracking

    sweep = tracking.read_sweep(sweep_id)
    found = {one.trial_id: one for one in tracking.find_ingredients(sweep)}
    report = tracking.read_report(sweep_id)
    version = registry.find_version(sweep.request.model, report.soup_sha256) if report else None
    scores = {point.trial_id: point.scores.held_out.value for point in report.trials} if report else {}
    endings, enough = tracking.read_endings(sweep_id), tracking.read_enough(sweep)
    drawn = sorted({*sweep.request.sweep.space, *sweep.request.sweep.grid})
    return {
        "sweep_id": sweep_id,
        "model": sweep.request.model,
        "trials": [
            {
                "trial_id": trial.id,
                **{name: getattr(trial.settings, name) for name in drawn},
                **_ending(trial.id in found, *endings.get(trial.id, ("", "")), enough),
                "held_out": found[trial.id].held_out.value if trial.id in found else scores.get(trial.id),
                "in_soup": bool(report and {*trial.ingredient_ids} & {*report.ingredients}),
            }
            for trial in sweep.trials
        ],
        "finished": sum(trial.id in found for trial in sweep.trials),
        "report": report.model_dump(mode="json") if report else None,
        "page": tracking.report_page(report) if report else None,
        "version": version.model_dump(mode="json") if version else None,
    }


def _ending(finished: bool, status: str, reason: str, enough: Enough | None) -> dict[str, str]:
    """A trial's state in one word, and the reason where it is not finished."""
    if finished:
        return {"state": "finished", "reason": ""}
    if enough and not status:
        return {"state": "not needed", "reason": enough.reason}
    words = {"": "not started", "RUNNING": "running", "KILLED": "interrupted", "FINISHED": "pruned"}
    return {"state": words.get(status, "failed"), "reason": reason}


def sweep_text(document: dict[str, Any]) -> str:
    """The same for a person: a line per trial, the comparison, the version and how to load it."""
    fixed = ("trial_id", "state", "reason", "held_out", "in_soup")
    table = Table("trial", "state", "held_out %", "in the soup", *[key for key in document["trials"][0] if key not in fixed])
    for row in document["trials"]:
        drawn = [f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items() if key not in fixed]
        table.add_row(row["trial_id"], row["state"], _percent(row["held_out"]), "yes" if row["in_soup"] else "", *drawn)
    reasons = dict.fromkeys(row["reason"] for row in document["trials"] if row["reason"])
    parts = [
        f"Sweep {document['sweep_id']} of {document['model']}: {document['finished']} of {len(document['trials'])} trials finished.",
        _text(table),
        *[f"{', '.join(row['trial_id'] for row in document['trials'] if row['reason'] == why)}: {why}" for why in reasons],
    ]
    if document["report"]:
        report = SoupReport.model_validate(document["report"])
        parts += [comparison(report), *[f"Left out: trial {trial}: {reason}" for trial, reason in report.excluded.items()]]
    if document["version"]:
        parts.append(version_line(ModelVersion.model_validate(document["version"])))
    if document["page"]:
        parts.append(f"The whole report: {document['page']}")
    return "\n".join(parts)


def sweeps_text(rows: list[Any]) -> str:
    """A line per sweep, newest first."""
    table = Table("sweep", "model", "trials", "finished", "status", "started")
    for row in rows:
        table.add_row(row.sweep_id, row.model, str(row.trials), str(row.finished), row.status, row.started)
    return _text(table) if rows else "The ledger has no sweep yet; start one with `stockpot retrain REQUEST.yaml`."


def versions_text(rows: list[VersionSummary]) -> str:
    """A line per registered version, newest first: its aliases, where it comes from, what it scored on the splits that were asked for."""
    if not rows:
        return "The registry has no version yet; `stockpot retrain REQUEST.yaml` ends with one."
    scored = {
        "held_out %": [row.scores.held_out.value if row.scores else None for row in rows],
        "gate %": [row.scores.gate.value if row.scores and row.scores.gate else None for row in rows],
        "test %": [row.scores.test.value if row.scores and row.scores.test else None for row in rows],
        "mean shift %": [row.scores.shift_average if row.scores else None for row in rows],
    }
    asked = {name: column for name, column in scored.items() if any(one is not None for one in column)}
    table = Table("model", "version", "aliases", "sweep", "soup", *asked, "registered")
    for place, row in enumerate(rows):
        cells = [_percent(column[place]) for column in asked.values()]
        table.add_row(
            row.model,
            str(row.version),
            ", ".join(row.aliases),
            row.sweep_id,
            f"{row.recipe} of {len(row.ingredients)}",
            *cells,
            row.registered,
        )
    return _text(table)


def comparison(report: SoupReport) -> str:
    """Everything that was scored, on every split, in percent."""
    head, *rows = soup_table.scores(report)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    return _text(table)


def version_line(version: ModelVersion) -> str:
    """What was registered and the one line that loads it."""
    address = f"models:/{version.model}@{version.alias}" if version.alias else f"models:/{version.model}/{version.version}"
    rank = f" is {version.alias}" if version.alias else ""
    return f'Version {version.version} of {version.model}{rank}: mlflow.pyfunc.load_model("{address}")'


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f}"


def _text(table: Table) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()
