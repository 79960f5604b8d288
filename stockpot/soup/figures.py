"""The figures of a soup's page, each an SVG drawn from the report alone: how the soup grew, the line to the init, how the pool lies around
it, and which classes changed. One look for all of them; `picture` has the one that is also shown elsewhere.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stockpot.outcomes import AlphaPoint, ClassChange, GreedyStep, MarginalPoint

GAIN, LOSS, QUIET, LINE = "#2a9d5c", "#c8553d", "#9aa5b1", "#1f5fa8"
LOOK: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "stockpot",
}
COLOURS = {"best_single": LINE, "uniform": GAIN, "greedy": LOSS}
SHOWN_CLASSES = 24


def growth(steps: Sequence[GreedyStep]) -> bytes:
    """Held-out accuracy of the greedy soup after every candidate, best trial first: flat where it was left out."""
    best, heights = 0.0, []
    for step in steps:
        best = step.after.value if step.kept else best
        heights.append(100 * best)
    places = np.arange(1, len(steps) + 1)
    figure, (axes,) = _figure(7.2, 3.4)
    axes.step(places, heights, where="post", color=QUIET, zorder=1)
    for kept, colour, label in ((True, GAIN, "kept"), (False, QUIET, "left out")):
        chosen = [place for place, step in zip(places, steps, strict=True) if step.kept is kept]
        axes.scatter(chosen, [heights[place - 1] for place in chosen], c=colour, s=40 if kept else 14, label=label, zorder=2)
    axes.set(xlabel="candidates tried, best single model first", ylabel="held_out of the soup, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right", frameon=False)
    return _svg(figure)


def alphas(lines: Mapping[str, Sequence[AlphaPoint]]) -> bytes:
    """Accuracy on the line from the init (0) to each model (1): held_out, and the mean over the suites where there are some."""
    shifted = all(point.scores.shift_average is not None for points in lines.values() for point in points)
    figure, axes = _figure(10.0 if shifted else 5.4, 3.6, 2 if shifted else 1)
    for name, points in lines.items():
        style: Any = {"marker": "o", "markersize": 4, "label": name.replace("_", " "), "color": COLOURS.get(name, QUIET)}
        places = [point.alpha for point in points]
        axes[0].plot(places, [100 * point.scores.held_out.value for point in points], **style)
        if shifted:
            axes[1].plot(places, [100 * (point.scores.shift_average or 0) for point in points], **style)
    for one, what in zip(axes, ("held_out", "mean shift"), strict=False):
        one.set(xlabel="alpha: 0 is the init, 1 the model", ylabel=f"{what}, %")
    axes[0].legend(frameon=False)
    return _svg(figure)


def worth(points: Sequence[MarginalPoint]) -> bytes:
    """Held-out accuracy of the greedy soup against the number of trials it could choose from, each doubling a step, and against what those
    trials cost."""
    figure, axes = _figure(10.0, 3.4, 2)
    heights = [100 * point.held_out.value for point in points]
    for one, places, what in (
        (axes[0], [point.trials for point in points], "trials"),
        (axes[1], [point.accelerator_hours for point in points], "accelerator hours"),
    ):
        one.plot(places, heights, marker="o", markersize=4, color=LOSS)
        one.set(xlabel=what, ylabel="held_out of the soup, %")
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks([point.trials for point in points], [str(point.trials) for point in points])
    axes[0].minorticks_off()
    return _svg(figure)


def angles(rows: Mapping[str, Sequence[float]]) -> bytes:
    """The angle between every two trials seen from the init, in degrees, as a map; numbers where they fit."""
    names, values = list(rows), np.array(list(rows.values()))
    side = min(2.2 + 0.42 * len(names), 10.0)
    figure, (axes,) = _figure(side + 1, side)
    image = axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=max(90.0, values.max()))
    axes.set_xticks(range(len(names)), [name[:6] for name in names], rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), [name[:6] for name in names], fontsize=8)
    axes.grid(visible=False)
    if len(names) <= 16:
        for (row, column), angle in np.ndenumerate(values):
            axes.text(column, row, f"{angle:.0f}", ha="center", va="center", fontsize=8, color="white" if angle > 60 else "#222")
    figure.colorbar(image, ax=axes, shrink=0.8, label="degrees")
    return _svg(figure)


def classes(changes: Sequence[ClassChange]) -> bytes:
    """Right answers per class won or lost by the soup against the best single model: the classes that changed most."""
    moved = sorted((one for one in changes if one.soup != one.single), key=lambda one: (-abs(one.soup - one.single), one.name))
    chosen = sorted(moved[:SHOWN_CLASSES], key=lambda one: (one.soup - one.single, one.name))
    figure, (axes,) = _figure(7.2, 1.0 + 0.28 * max(len(chosen), 1))
    gains = [one.soup - one.single for one in chosen]
    axes.barh([one.name for one in chosen], gains, color=[GAIN if gain > 0 else LOSS for gain in gains], height=0.7)
    axes.axvline(0, color="#555", linewidth=0.8)
    axes.set(xlabel="right answers won (right) or lost (left) against the best single model")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for place, one in enumerate(chosen):
        axes.annotate(
            f"{one.single} → {one.soup} of {one.seen}",
            (gains[place], place),
            xytext=(4 if gains[place] > 0 else -4, 0),
            textcoords="offset points",
            va="center",
            ha="left" if gains[place] > 0 else "right",
            fontsize=8,
            color="#555",
        )
    axes.margins(x=0.25)
    return _svg(figure)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    with rc_context(LOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, [figure.add_subplot(1, columns, place + 1) for place in range(columns)]


def _svg(figure: Figure) -> bytes:
    data = io.BytesIO()
    with rc_context(LOOK):
        figure.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()
