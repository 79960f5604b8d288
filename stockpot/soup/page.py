"""The report of one soup as a single HTML file: no script, no other file, readable offline. The card for people who want to look closer."""

import base64
import html
import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import binomtest

from stockpot.config import Sweep
from stockpot.outcomes import Accuracy, Scores, SoupReport
from stockpot.soup import card, picture

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}tr.kept{background:#eef7ee}img{max-width:100%}small{color:#666}code{font-size:.85em}"""


def write(report: SoupReport, sweep: Sweep) -> str:
    """The whole page."""
    title = f"{report.model}: {report.recipe} soup {report.soup_sha256[:12]}"
    parts = [
        f"<h1>{html.escape(title)}</h1><p>{html.escape(card.verdict(report))}</p>",
        _image(picture.draw(report), "Held-out accuracy against the mean over shift suites, one point a trial"),
        "<h2>Scores, %</h2>",
        "<p><small>In brackets: 95 % Wilson interval. held_out is selected on, gate decides promotion, test is only read.</small></p>",
        _scores(report),
        "<h2>Greedy decisions on held_out</h2>",
        _decisions(report),
        "<h2>What each kept trial added</h2>",
        _image(_growth(report), "Held-out accuracy of the greedy soup against its number of ingredients"),
        _alphas(report),
        _angles(report),
        "<h2>Trials</h2>",
        _trials(report, sweep),
        _excluded(report),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{"".join(parts)}</html>\n'


def _scores(report: SoupReport) -> str:
    suites = sorted(report.scores["best_single"].shifts)
    rows = [[name.replace("_", " "), *[_interval(one) for one in _splits(scores, suites)]] for name, scores in report.scores.items()]
    return _table(["", "held_out", "gate", "test", *suites], rows)


def _splits(scores: Scores, suites: Sequence[str]) -> list[Accuracy | None]:
    return [scores.held_out, scores.gate, scores.test, *[scores.shifts.get(suite) for suite in suites]]


def _interval(score: Accuracy | None) -> str:
    if score is None:
        return ""
    ends = binomtest(score.correct, score.seen).proportion_ci(0.95, "wilson")
    return f"{100 * score.value:.2f} [{100 * ends.low:.1f}, {100 * ends.high:.1f}]"


def _decisions(report: SoupReport) -> str:
    rows = [
        [
            step.trial_id,
            str(step.before.correct) if step.before else "",
            f"{'' if step.exact else 'at most '}{step.after.correct}",
            str(step.examined or step.after.seen),
            "kept" if step.kept else "left out",
            str(step.size),
        ]
        for step in report.steps
    ]
    head = ["trial", "right before", "right after", f"looked at, of {report.steps[0].after.seen}", "decision", "ingredients"]
    return _table(head, rows, {step.trial_id for step in report.steps if step.kept})


def _trials(report: SoupReport, sweep: Sweep) -> str:
    settings = {name: trial.settings for trial in sweep.trials for name in trial.ingredient_ids}
    drawn = sorted({"learning_rate", *sweep.request.sweep.space})
    rows = []
    for point in sorted(report.trials, key=lambda one: -one.scores.held_out.correct):
        values = [getattr(settings[point.trial_id], name) for name in drawn]
        shown = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        shift = point.scores.shift_average
        rows.append([point.trial_id, *shown, f"{100 * point.scores.held_out.value:.2f}", "" if shift is None else f"{100 * shift:.2f}"])
    return _table(["trial", *drawn, "held_out, %", "mean shift, %"], rows, {point.trial_id for point in report.trials if point.kept})


def _excluded(report: SoupReport) -> str:
    items = "".join(f"<li><code>{trial}</code> {html.escape(reason)}</li>" for trial, reason in report.excluded.items())
    return f"<h2>Left out before cooking</h2><ul>{items}</ul>" if items else ""


def _growth(report: SoupReport) -> bytes:
    figure, kept = _figure(), [step for step in report.steps if step.kept]
    axes = figure.add_subplot(xlabel="ingredients", ylabel="held_out, %")
    axes.plot([step.size for step in kept], [100 * step.after.value for step in kept], marker="o", color="#d62728")
    axes.set_xticks([step.size for step in kept])
    axes.grid(visible=True, alpha=0.3)
    return _png(figure)


def _alphas(report: SoupReport) -> str:
    if not report.alphas:
        return ""
    figure = _figure(2)
    axes = [
        figure.add_subplot(1, 2, place + 1, xlabel="alpha (0 init, 1 model)", ylabel=f"{what}, %")
        for place, what in enumerate(("held_out", "mean shift"))
    ]
    for name, points in report.alphas.items():
        places = [point.alpha for point in points]
        axes[0].plot(places, [100 * point.scores.held_out.value for point in points], marker="o", label=name.replace("_", " "))
        axes[1].plot(places, [100 * (point.scores.shift_average or 0) for point in points], marker="o", label=name.replace("_", " "))
    for one in axes:
        one.grid(visible=True, alpha=0.3)
        one.legend()
    return "<h2>On the line to the init</h2>" + _image(_png(figure), "Accuracy of weights interpolated with the init")


def _angles(report: SoupReport) -> str:
    if not report.angles:
        return ""
    ids = list(report.angles)
    rows = [[trial, *[f"{angle:.0f}" for angle in report.angles[trial]]] for trial in ids]
    return "<h2>Angles between trials, seen from the init, in degrees</h2>" + _table(["", *[trial[:6] for trial in ids]], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kept: set[str] | None = None) -> str:
    body = "".join(
        f"<tr{' class=kept' if kept and row[0] in kept else ''}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>{body}</table>"


def _image(png: bytes, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _figure(columns: int = 1) -> Figure:
    figure = Figure(figsize=(6.0 * columns, 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()
