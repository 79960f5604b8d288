"""What people see on the Prefect page: progress of the fan-out, the sweep table, the greedy decisions and the picture.

Artifact keys take lowercase letters, numbers and dashes only; ids here are hex, so they fit."""

import base64
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from prefect.artifacts import (
    acreate_progress_artifact,
    acreate_table_artifact,
    aupdate_progress_artifact,
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from stockpot.config import Sweep
from stockpot.outcomes import Accuracy, ModelVersion, SoupReport
from stockpot.soup import table
from tasks.dispatching import Outcome
from tasks.patience import PICTURE_S, only_a_picture, patiently


def sweep_progress(sweep: Sweep, done: int) -> Callable[[list[Outcome]], Coroutine[Any, Any, None]]:
    """A progress artifact for the sweep's trials, drawn by what this returns for `run_to_end` to call on every change. `done` were finished
    before."""
    total, artifact = len(sweep.trials), None

    async def show(outcomes: list[Outcome]) -> None:
        nonlocal artifact
        ended = done + sum(one.state != "open" for one in outcomes)
        spared = [one.reason for one in outcomes if one.state == "not needed"]
        told = f"{ended} of {total} trials ended" + (f", {len(spared)} of them not needed: {spared[0]}" if spared else "")
        percent, key = 100 * ended / total, f"sweep-{sweep.id}-progress"
        with only_a_picture("The progress of the sweep"):
            if artifact is None:
                artifact = await patiently(lambda: acreate_progress_artifact(percent, key=key, description=told), PICTURE_S)
            else:
                await patiently(partial(aupdate_progress_artifact, artifact, percent, description=told), PICTURE_S)

    return show


async def show_sweep(sweep: Sweep, finished: dict[str, str], failed: dict[str, str], spared: dict[str, str]) -> None:
    """One row per trial: what was drawn, how it ended. failed, spared: trial id to the reason."""
    key, description = f"sweep-{sweep.id}-trials", f"Trials of sweep {sweep.id} for model {sweep.request.model}"
    ended = dict.fromkeys(finished, "finished") | failed | {trial: f"not needed: {reason}" for trial, reason in spared.items()}
    drawn = sorted({*sweep.request.sweep.space, *sweep.request.sweep.grid})
    rows = [
        {
            "trial": trial.id,
            "held_out": finished.get(trial.id, ""),
            "ended": ended.get(trial.id, "not run"),
            **{name: getattr(trial.settings, name) for name in drawn},
        }
        for trial in sweep.trials
    ]
    with only_a_picture("The table of trials"):
        await patiently(lambda: acreate_table_artifact(rows, key=key, description=description), PICTURE_S)


def show_soup(report: SoupReport, version: ModelVersion, verdict: str, picture: bytes, page: str, approval: str | None = None) -> None:
    """Decisions, scores, the gate's `verdict` and the picture of one soup. `page` is the address of the soup's report, `approval` that of
    the run that waits for a person, if one does."""
    create_table_artifact(
        [
            {
                "trial": step.trial_id,
                "before": percent(step.before),
                "after": percent(step.after) if step.exact else f"at most {percent(step.after)}",
                "kept": "kept" if step.kept else "left out",
                "ingredients": step.size,
            }
            for step in report.steps
        ],
        key=f"soup-{report.sweep_id}-decisions",
        description=f"Greedy decisions of sweep {report.sweep_id}, in order, on held_out",
    )
    head, *rows = table.filled(report, percent)
    create_table_artifact(
        [dict(zip(head, row, strict=True)) for row in rows],
        key=f"soup-{report.sweep_id}-scores",
        description=" ".join(table.notes(report)),
    )
    create_image_artifact(
        "data:image/png;base64," + base64.b64encode(picture).decode(),
        key=f"soup-{report.sweep_id}-picture",
        description="Held-out accuracy against the average of the shift suites",
    )
    create_markdown_artifact(
        f"**{version.model} version {version.version}** is `{version.alias or 'without an alias'}`. {verdict}\n\n"
        + (f"[Approve or decline it]({approval}): press Resume there.\n\n" if approval else "")
        + f"Ingredients: {', '.join(report.ingredients)}.\n\n[Card, report and picture in MLflow]({page})",
        key=f"soup-{report.sweep_id}-version",
        description=f"Version {version.version} of {version.model}",
    )
    create_link_artifact(
        page,
        link_text=f"Report of {version.model} version {version.version}",
        key=f"soup-{report.sweep_id}-report",
        description="The whole report: picture, scores with intervals, every decision, curves and trials",
    )


def percent(accuracy: Accuracy | None) -> str:
    """`95.25 (381/400)`, or nothing."""
    if accuracy is None:
        return ""
    return accuracy.told if accuracy.other is not None else f"{100 * accuracy.value:.2f} ({accuracy.correct}/{accuracy.seen})"
