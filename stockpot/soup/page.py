"""The report of one soup as a single HTML file: no script, no other file, readable offline. The card for people who want to look closer."""

import base64
import html
from collections.abc import Sequence

from scipy.stats import binomtest

from stockpot.config import Sweep
from stockpot.fields import METRICS
from stockpot.outcomes import Accuracy, SoupReport
from stockpot.soup import card, figures, picture, table

STYLE = """:root{color-scheme:light}
body{font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;margin:0 auto;max-width:68rem;padding:2rem 1.25rem 4rem;color:#1d2733}
h1{font-size:1.6rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.6rem 0 .4rem;padding-top:.8rem;border-top:1px solid #e3e8ee}
p{max-width:46rem}p.lead{font-size:1.05rem;margin-top:0}small,p.note{color:#5b6876;font-size:.88rem}code{font-size:.85em;color:#39485a}
ul.facts{display:flex;flex-wrap:wrap;gap:.75rem;list-style:none;padding:0;margin:1.2rem 0}
ul.facts li{border:1px solid #e3e8ee;border-radius:.5rem;padding:.6rem 1rem;min-width:8.5rem;background:#fafbfc}
ul.facts b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}ul.facts span{color:#5b6876;font-size:.82rem}
div.wide{overflow-x:auto}table{border-collapse:collapse;margin:.6rem 0;font-variant-numeric:tabular-nums;font-size:.9rem;white-space:nowrap}
td,th{padding:.3rem .75rem;border-bottom:1px solid #e9edf1;text-align:right}th{color:#5b6876;font-weight:600}
td:first-child,th:first-child{text-align:left}tr.kept td{background:#eef7f0}td small{display:block;line-height:1.1;font-size:.78rem}
img{max-width:100%;height:auto;display:block;margin:.6rem 0}"""


def write(report: SoupReport, sweep: Sweep) -> str:
    """The whole page."""
    title = f"{report.model}: {report.recipe} soup {report.soup_sha256[:12]}"
    parts = [
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(card.verdict(report))}</p>',
        _facts(report),
        _image(picture.draw(report, "svg"), "Held-out accuracy against the mean over shift suites, one point a trial"),
        _section("Comparison", " ".join([_measure(report), *table.notes(report)])),
        _comparison(report),
        _listed("Near misses", card.near_misses(report)),
        _listed("Soupability", card.soupability(report)),
        _section("Greedy decisions", "On held_out, trial by trial. A candidate that is lost already is not looked at further."),
        _image(figures.growth(report.steps), "Held-out accuracy of the greedy soup after every candidate"),
        _decisions(report),
        _classes(report),
        _alphas(report),
        _angles(report),
        _worth(report),
        _section("Trials", "Best first; those in the greedy soup are tinted. Settings are the ones the sweep varied."),
        _trials(report, sweep),
        _listed("Left out before cooking", [f"{trial}: {reason}" for trial, reason in report.excluded.items()]),
        _identity(report),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(parts)}</body></html>\n'


def _facts(report: SoupReport) -> str:
    """The numbers people ask for first: the shipped soup, and its gain over the best single model."""
    soup, single = report.scores[report.recipe], report.scores["best_single"]
    after, before = report.held_out(report.recipe, "best_single")
    told = {"trials in the soup": f"{len(report.ingredients)} of {len(report.trials)}"}
    for name, ours, theirs in (
        ("held_out", after.value, before.value),
        ("test", soup.test.value if soup.test else None, single.test.value if single.test else None),
        ("mean shift", soup.shift_average, single.shift_average),
    ):
        if ours is not None and theirs is not None:
            told[f"{name}, {100 * (ours - theirs):+.2f} against the best single"] = f"{100 * ours:.2f} %"
    return f'<ul class="facts">{"".join(f"<li><b>{value}</b><span>{name}</span></li>" for name, value in told.items())}</ul>'


def _comparison(report: SoupReport) -> str:
    return _table(table.head(report), table.rows(report, _interval), {report.recipe.replace("_", " ")})


def _measure(report: SoupReport) -> str:
    if report.metric == "accuracy":
        return "Accuracy in percent, with 95 % Wilson intervals."
    return f"{METRICS[report.metric].capitalize()} in percent."


def _interval(score: Accuracy | None) -> str:
    if score is None:
        return ""
    if score.other is not None:
        return score.told
    ends = binomtest(score.correct, score.seen).proportion_ci(0.95, "wilson")
    return f"{100 * score.value:.2f}<small>{100 * ends.low:.1f}–{100 * ends.high:.1f}</small>"


def _decisions(report: SoupReport) -> str:
    rows = [
        [
            step.trial_id,
            step.before.told if step.before else "",
            f"{'' if step.exact else 'at most '}{step.after.told}",
            str(step.examined or step.after.seen),
            "kept" if step.kept else "left out",
            str(step.size),
        ]
        for step in report.steps
    ]
    head = ["trial", "before", "after", f"looked at, of {report.steps[0].after.seen}", "decision", "ingredients"]
    rest = card.unvisited(report)
    return _table(head, rows, {step.trial_id for step in report.steps if step.kept}) + (
        f'<p class="note">{rest.strip()}</p>' if rest else ""
    )


def _classes(report: SoupReport) -> str:
    moved = sum(one.soup != one.single for one in report.classes)
    if not moved:
        return ""
    told = (
        f"{moved} of {len(report.classes)} classes changed on the gate split; the ones that changed most, at most {figures.SHOWN_CLASSES}."
    )
    return _section("Classes", told) + _image(figures.classes(report.classes), "Right answers won and lost per class")


def _alphas(report: SoupReport) -> str:
    if not report.alphas:
        return ""
    told = "Weights between the init and each model. A peak inside means some of the init's robustness is worth keeping."
    return _section("On the line to the init", told) + _image(figures.alphas(report.alphas), "Accuracy of weights between init and model")


def _angles(report: SoupReport) -> str:
    if not report.angles:
        return ""
    told = "Between every two trials, seen from the init, in degrees. Small: the two learned the same; near 90: unrelated directions."
    return _section("Angles", told) + _image(figures.angles(report.angles), "Angle between every two trials")


def _worth(report: SoupReport) -> str:
    if not report.marginal:
        return ""
    told = "Greedy soups of the trials drawn first. Gains are over the row above, in points of held_out. " + card.expectation(report)
    drawn = _image(figures.worth(report.marginal), "Held-out accuracy of the greedy soup against trials and against accelerator hours")
    return _section("What more trials brought", told) + drawn + _table(card.WORTH, card.worth_rows(report))


def _trials(report: SoupReport, sweep: Sweep) -> str:
    settings = {name: trial.settings for trial in sweep.trials for name in trial.ingredient_ids}
    varied = sorted({"learning_rate", *sweep.request.sweep.space, *sweep.request.sweep.grid})
    rows = []
    for point in sorted(report.trials, key=lambda one: (-one.scores.held_out.value, one.trial_id)):
        own = settings.get(point.trial_id)
        values = [getattr(own, name) if own else "" for name in varied]
        shown = [f"{value:.3g}" if isinstance(value, float) else html.escape(str(value)) for value in values]
        rows.append([point.trial_id, *shown, _interval(point.scores.held_out), _percent(point.scores.shift_average)])
    return _table(["trial", *varied, "held_out", "mean shift"], rows, {point.trial_id for point in report.trials if point.kept})


def _listed(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h2>{title}</h2><ul>{items}</ul>" if items else ""


def _identity(report: SoupReport) -> str:
    rows = [[name, f"<code>{html.escape(value)}</code>"] for name, value in card.identity(report).items()]
    return _section("Identity", "Rebuild the weights from the ingredients and compare them: <code>stockpot reproduce</code>.") + _table(
        [], rows
    )


def _section(title: str, told: str) -> str:
    return f'<h2>{title}</h2><p class="note">{told}</p>'


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kept: set[str] | None = None) -> str:
    """Cells are HTML; the head is text. Rows whose first cell is in `kept` are tinted."""
    body = "".join(
        f"<tr{' class=kept' if kept and row[0] in kept else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows
    )
    names = f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    return f'<div class="wide"><table>{names}{body}</table></div>'


def _image(svg: bytes, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'
