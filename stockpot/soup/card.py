"""The soup card: what a soup is made of, what it scored and how each ingredient was decided, as markdown for a run and a version page."""

from stockpot.fields import METRICS
from stockpot.outcomes import Accuracy, GreedyStep, SoupReport
from stockpot.soup import table
from stockpot.soup.marginal import expected_gain


def write(report: SoupReport) -> str:
    """The whole card."""
    parts = [
        f"# {report.model}: {report.recipe} soup {report.soup_sha256[:12]}",
        verdict(report),
        _comparison(report),
        _decisions(report),
        _listed("Near misses", near_misses(report)),
        _listed("Soupability", soupability(report)),
        _worth(report),
        _listed("Left out before cooking", [f"{trial}: {reason}" for trial, reason in report.excluded.items()]),
        _facts(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(report: SoupReport) -> str:
    """One honest sentence: did the shipped soup beat the best single model, and where."""
    if report.champion and report.ingredients == (report.champion.ingredient_id,):
        return f"No soup improved on the champion, version {report.champion.version}, on held_out, so it ships again."
    if len(report.ingredients) == 1:
        return f"No soup improved on the best single model on held_out, so the best single model, trial {report.ingredients[0]}, ships."
    soup, single = report.scores[report.recipe], report.scores["best_single"]
    whose = "samples it was not fitted on" if report.recipe in report.unfitted and report.shares else "selected on"
    told = [f"{_points(*report.held_out(report.recipe, 'best_single'))} on held_out ({whose})"]
    if soup.test and single.test:
        told.append(f"{_points(soup.test, single.test)} on test")
    if soup.shift_average is not None and single.shift_average is not None:
        suites = f"the mean of {len(soup.shifts)} shift suites" if len(soup.shifts) > 1 else "the shift suite"
        told.append(f"{100 * (soup.shift_average - single.shift_average):+.2f} on {suites}")
    return f"{len(report.ingredients)} of {len(report.trials)} trials. Against the best single model, in points: {', '.join(told)}."


def _comparison(report: SoupReport) -> str:
    head = table.head(report)
    lines = [_line(head), _line(["---"] * len(head)), *[_line(row) for row in table.rows(report)]]
    return "\n".join(["## Comparison\n", *lines, "", *[f"- {note}" for note in table.notes(report)]])


def _decisions(report: SoupReport) -> str:
    lines = [_line(["trial", "before", "after", "decision", "ingredients"]), _line(["---"] * 5)]
    lines += [
        _line([step.trial_id, _counts(step.before), _after(step), "kept" if step.kept else "left out", str(step.size)])
        for step in report.steps
    ]
    told = "right answers" if report.metric == "accuracy" else f"{METRICS[report.metric]} in percent,"
    return f"## Greedy decisions, {told} on held_out\n\n" + "\n".join(lines) + unvisited(report)


def unvisited(report: SoupReport) -> str:
    """What greedy's budget left no room for, as a sentence; empty where it visited all."""
    visited = {step.trial_id for step in report.steps}
    rest = [point.trial_id for point in report.trials if point.trial_id not in visited]
    return f"\n\nNever visited, for the budget was spent: {', '.join(rest)}." if rest else ""


def _after(step: GreedyStep) -> str:
    return _counts(step.after) if step.exact else f"at most {_counts(step.after)} (settled after {step.examined})"


NEAR = 3
"""Right answers that a near miss lacks at the most."""


def near_misses(report: SoupReport) -> list[str]:
    """What greedy can miss by a few answers, as sentences: ingredients it left out, and recipes that score better on held_out than what
    ships."""
    lines = [
        f"Greedy left out {step.trial_id} at {_counts(step.after)}, {step.lacked} below the soup without it."
        for step in report.steps
        if step.lacked is not None and step.lacked <= NEAR
    ]
    lines += [
        f"{name.replace('_', ' ').capitalize()} has {_counts(found)} on held_out, what ships {_counts(shipped)}."
        for name in report.scores
        for found, shipped in [report.held_out(name, report.recipe)]
        if found.seen == shipped.seen and found.value > shipped.value
    ]
    return lines


def soupability(report: SoupReport) -> list[str]:
    """How the pool lies, as sentences: the same weights twice, and half way from the best single model to each other."""
    lines = [f"The same weights to the bit: {', '.join(group)}." for group in report.duplicates]
    ends = {point.trial_id: point.scores.held_out for point in report.trials}
    for trial, middle in report.midpoints.items():
        sunk = (ends[trial].value + ends[report.best_single].value) / 2 - middle.value
        lines.append(f"Half way to {trial}: {table.percent(middle)} %, {100 * -sunk:+.2f} points against the mean of both ends.")
    return lines


def _listed(title: str, lines: list[str]) -> str:
    return "\n".join([f"## {title}\n", *[f"- {line}" for line in lines]]) if lines else ""


def _worth(report: SoupReport) -> str:
    """What more trials brought, and what the next one is expected to."""
    if not report.marginal:
        return ""
    lines = [_line(row) for row in worth_rows(report)]
    return "\n".join(["## What more trials brought\n", _line(WORTH), _line(["---"] * len(WORTH)), *lines, "", expectation(report)])


WORTH = ["trials", "greedy on held_out, %", "accelerator hours", "points per trial", "points per accelerator hour"]


def worth_rows(report: SoupReport) -> list[list[str]]:
    """The marginal curve as cells under `WORTH`; a point's gains are over the point before it."""
    return [
        [str(one.trials), table.percent(one.held_out), f"{one.accelerator_hours:.3g}", _gain(one.gain_per_trial), _gain(one.gain_per_hour)]
        for one in report.marginal
    ]


def expectation(report: SoupReport) -> str:
    """What one more trial is expected to bring, for the hours that a trial took so far; empty where nothing can be said."""
    expected = expected_gain(report.marginal)
    if expected is None:
        return ""
    hours = report.marginal[-1].accelerator_hours / report.marginal[-1].trials
    an_hour = f", {100 * expected / hours:.3f} an accelerator hour" if hours else ""
    return f"One more trial is expected to bring {100 * expected:.3f} points{an_hour}."


def _gain(gain: float | None) -> str:
    return "" if gain is None else f"{100 * gain:+.3f}"


def _facts(report: SoupReport) -> str:
    return "## Identity\n\n" + "\n".join(f"- {name}: `{value}`" for name, value in identity(report).items())


def identity(report: SoupReport) -> dict[str, str]:
    """What decides a soup and what it is known by, each by its name."""
    champion = report.champion
    facts = {
        "weights sha256": report.soup_sha256,
        "snapshot": f"{report.data.snapshot.digest} ({report.data.snapshot.uri})" if report.data else "",
        "init": report.init_digest,
        "evaluation transform": report.transform_digest,
        "sweep": report.sweep_id,
        "ingredients": ", ".join(report.ingredients),
        "of earlier sweeps": ", ".join(
            f"{trial} ({report.origins[trial]})" for trial in report.ingredients if trial in report.origins.keys() - report.borrowed.keys()
        ),
        "bodies of other models": ", ".join(
            f"{trial} ({report.borrowed[trial].model}, sweep {report.origins[trial]})"
            for trial in report.ingredients
            if trial in report.borrowed
        ),
        "champion that joined": f"{champion.ingredient_id}, version {champion.version}" if champion else "",
        "share of the soup, the rest is the init": "" if report.alpha is None else f"{report.alpha:g}",
        "BatchNorm": f"statistics estimated on {report.batch_norm_samples} training samples" if report.batch_norm_samples else "",
        "type": report.dtype,
        "made by": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    return {name: value for name, value in facts.items() if value}


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _counts(score: Accuracy | None) -> str:
    return score.told if score else ""


def _points(one: Accuracy, other: Accuracy) -> str:
    return f"{100 * (one.value - other.value):+.2f}"
