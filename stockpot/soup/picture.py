"""The picture of a sweep: held-out accuracy against the average of the shift suites, one point a trial, and the soups (the first figure of
Wortsman et al. 2022, arXiv:2203.05482). Without suites, against the test split or the trial's place.
"""

import io
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stockpot.fields import METRICS
from stockpot.outcomes import SoupReport

MARKS = {
    "best_single": ("Best single model", "D", "#1f77b4"),
    "uniform": ("Uniform soup", "s", "#2ca02c"),
    "greedy": ("Greedy soup", "*", "#d62728"),
}


def draw(report: SoupReport, kind: Literal["png", "svg"] = "png") -> bytes:
    """The picture as PNG, or as SVG."""
    figure = Figure(figsize=(7.2, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    by_shift = report.scores["best_single"].shift_average is not None
    _trials(axes, report, by_shift)
    _soups(axes, report, by_shift)
    axes.set_xlabel(f"held_out {METRICS[report.metric]}, %")
    axes.set_ylabel(f"mean {METRICS[report.metric]} over shift suites, %" if by_shift else "trial")
    axes.set_title(f"{report.model}, sweep {report.sweep_id}: {len(report.ingredients)} of {len(report.trials)} trials in the soup")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="best")
    data = io.BytesIO()
    figure.savefig(data, format=kind)
    return data.getvalue()


def _trials(axes: Axes, report: SoupReport, by_shift: bool) -> None:
    for kept, label, colour in ((False, "Trials left out", "#b0b0b0"), (True, "Trials in the greedy soup", "#ff9896")):
        points = [point for point in report.trials if point.kept is kept]
        heights = [100 * (point.scores.shift_average or 0) if by_shift else point.index for point in points]
        axes.scatter(
            [100 * point.scores.held_out.value for point in points],
            heights,
            c=colour,
            label=label,
            s=45,
            edgecolors="black",
            linewidths=0.5,
        )


def _soups(axes: Axes, report: SoupReport, by_shift: bool) -> None:
    for name, (label, mark, colour) in MARKS.items():
        scores = report.scores[name]
        if by_shift:
            axes.scatter(
                100 * scores.held_out.value,
                100 * (scores.shift_average or 0),
                marker=mark,
                c=colour,
                s=170,
                label=label,
                zorder=3,
                edgecolors="black",
            )
        else:
            axes.axvline(100 * scores.held_out.value, color=colour, label=label)
