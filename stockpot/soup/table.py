"""The one table of a sweep: every recipe and yardstick a row, with what it scored, how it is calibrated and what it cost. Card, page, the
artifact `comparison.csv`, Prefect and `stockpot explain` show the same cells; `stockpot status` and the demo those of the scores.
"""

import csv
import io
from collections.abc import Callable, Sequence

from stockpot.fields import METRICS
from stockpot.outcomes import Accuracy, Scores, SoupReport

Shown = Callable[[Accuracy | None], str]
"""How a score is written."""

ECE = "ECE, %"
"""Title of the first column behind the scores."""

NOTES = (
    "held_out was selected on, gate decides promotion, test and shift suites are only read; mean shift is the plain mean of the suites.",
    "ECE is the expected calibration error on gate, tempered after dividing logits by the one temperature that held_out asks for.",
    (
        "Evaluations (forward passes of one sample) and seconds are of making and scoring it; passes whose scores were cached are left "
        "out, so a second cook, or a recipe that shares soups with one above it, shows less than it would cost alone."
    ),
    (
        "Peak memory is the most that the process held resident meanwhile, libraries, decoded images and mapped weight files among it; on "
        "a GPU the most that was allocated there."
    ),
)
"""What the columns mean, as sentences."""

AHEAD = "(+ so many): passes on devices that were idle, for candidates greedy did not ask about in the end."


def percent(score: Accuracy | None) -> str:
    """Two digits; empty for what was not measured."""
    return f"{100 * score.value:.2f}" if score else ""


def notes(report: SoupReport) -> list[str]:
    """What the columns of this table mean, as sentences."""
    told = [f"{_name(name)} {score.told}" for name, score in report.unfitted.items()]
    whole = "Learned mixing has its held_out score on the samples that it was not fitted on. There are"
    ahead = [AHEAD] if any(cost.speculated for cost in report.costs.values()) else []
    return [*NOTES, *([f"{whole}: {', '.join(told)}."] if told else []), *ahead]


def head(report: SoupReport) -> list[str]:
    """Titles, the first of the names."""
    splits = ["held_out", "gate", "test", *_suites(report), "mean shift"]
    return [f"{METRICS[report.metric]}, %", *splits, ECE, "tempered, %", "evaluations", "seconds", "peak memory, GB"]


def rows(report: SoupReport, shown: Shown = percent) -> list[list[str]]:
    """A row for everything that was scored, in the order of the report."""
    return [
        [_name(name), *_scores(scores, _suites(report), shown), *_calibration(report, name), *_cost(report, name)]
        for name, scores in report.scores.items()
    ]


def filled(report: SoupReport, shown: Shown = percent) -> list[list[str]]:
    """Head and rows, without columns that are empty throughout."""
    return _without_empty([head(report), *rows(report, shown)])


def scores(report: SoupReport) -> list[list[str]]:
    """The same of the scores alone."""
    end = head(report).index(ECE)
    return _without_empty([line[:end] for line in (head(report), *rows(report))])


def text(report: SoupReport) -> str:
    """The table in columns of spaces, without those that are empty throughout."""
    lines = filled(report)
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(wide[0]), *map(str.rjust, line[1:], wide[1:])]).rstrip() for line in lines)


def as_csv(report: SoupReport) -> str:
    """The table as comma-separated values, which MLflow shows as a table."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([head(report), *rows(report)])
    return file.getvalue()


def _without_empty(lines: list[list[str]]) -> list[list[str]]:
    kept = [place for place in range(len(lines[0])) if any(line[place] for line in lines[1:])]
    return [[line[place] for place in kept] for line in lines]


def _name(recipe: str) -> str:
    return recipe.replace("_", " ")


def _suites(report: SoupReport) -> list[str]:
    return sorted(report.scores["best_single"].shifts)


def _scores(scores: Scores, suites: Sequence[str], shown: Shown) -> list[str]:
    average = scores.shift_average
    splits = [scores.held_out, scores.gate, scores.test, *[scores.shifts.get(suite) for suite in suites]]
    return [*map(shown, splits), "" if average is None else f"{100 * average:.2f}"]


def _calibration(report: SoupReport, name: str) -> list[str]:
    known = report.calibration.get(name)
    return [f"{100 * known.before:.2f}", f"{100 * known.after:.2f}"] if known else ["", ""]


def _cost(report: SoupReport, name: str) -> list[str]:
    cost = report.costs.get(name)
    if cost is None:
        return ["", "", ""]
    peak = "not measured" if cost.peak_bytes is None else f"{cost.peak_bytes / 1e9:.2f}"
    passes = f"{cost.samples:,}" + (f" (+{cost.speculated:,})" if cost.speculated else "")
    return [passes, f"{cost.seconds:.1f}", peak]
