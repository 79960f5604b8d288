"""Guards: picture, card and page of a soup are whole for every kind of report, escape what people wrote, and need no other file."""

import re
from base64 import b64decode
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from deployments.tables import comparison
from stockpot.config import RetrainRequest, Sweep
from stockpot.outcomes import Accuracy, AlphaPoint, Calibration, ClassChange, Cost, GreedyStep, Scores, SoupReport, TrialPoint
from stockpot.soup import card, page, picture, table
from stockpot.soup.marginal import curve
from stockpot.sweeps import plan
from tests.requests_for_tests import DATA, INIT, REQUEST


def score(correct: int) -> Accuracy:
    return Accuracy(correct=correct, seen=200)


@pytest.fixture
def sweep() -> Sweep:
    return plan(RetrainRequest.model_validate({**REQUEST, "sweep": {"trials": 3, "grid": {"mixup": [0.0, 0.2, 0.5]}}}), DATA, INIT)


def report(sweep: Sweep, shifts: bool, full: bool) -> SoupReport:
    ids = [trial.id for trial in sweep.trials]
    scores = Scores(held_out=score(190), gate=score(180), test=score(185) if full else None, shifts={"blur": score(120)} if shifts else {})
    points = tuple(TrialPoint(trial_id=trial, index=index, scores=scores, kept=index == 0) for index, trial in enumerate(ids))
    steps = (
        GreedyStep(trial_id=ids[0], before=None, after=score(188), kept=True, size=1, examined=200),
        GreedyStep(trial_id=ids[1], before=score(188), after=score(190), kept=True, size=2, examined=200),
        GreedyStep(trial_id=ids[2], before=score(190), after=score(188), kept=False, size=2, examined=64),
    )
    line = tuple(AlphaPoint(alpha=alpha, scores=scores) for alpha in (0.0, 1.0))
    return SoupReport(
        sweep_id=sweep.id, model=sweep.request.model, mlflow_run_id="r", recipe="greedy", soup_sha256="a" * 64, init_digest="b" * 64,
        transform_digest="t", best_single=ids[0], ingredients=tuple(ids[:2]), steps=steps,
        scores=dict.fromkeys(("best_single", "uniform", "greedy"), scores), trials=points,
        excluded={"feedbeef": "its `<head>` holds a NaN"} if full else {}, alphas={"greedy": line} if full else {},
        angles={ids[0]: (0.0, 90.0, 80.0), ids[1]: (90.0, 0.0, 75.0), ids[2]: (80.0, 75.0, 0.0)} if full else {},
        marginal=curve([(1, score(188)), (2, score(190)), (3, score(190))], [1800.0, 1800.0, 7200.0]) if full else (),
        classes=(ClassChange(name="<zero>", seen=9, single=7, soup=8), ClassChange(name="one", seen=9, single=5, soup=5)) if full else (),
    )  # fmt: skip


@pytest.mark.parametrize(("shifts", "full"), [(True, True), (False, False), (True, False)])
def test_the_page_stands_alone_and_says_everything(sweep: Sweep, shifts: bool, full: bool) -> None:
    one = report(sweep, shifts, full)
    text = page.write(one, sweep)
    assert not re.findall(r"<script|(?:src|href)=\"(?!data:)", text)
    assert all(trial.id in text for trial in sweep.trials)
    assert "at most 188" in text
    assert ("&lt;head&gt;" in text) is full
    for title in ("On the line to the init", "1 of 2 classes changed", "<h2>Angles</h2>", "What more trials brought", "<td>+2.000</td>"):
        assert (title in text) is full
    assert "95.00<small>91.0–97.3</small>" in text, "190 of 200 with its Wilson interval"
    assert "mixup" in text, "a setting of the grid is told"
    HTMLParser().feed(text)
    assert all(ET.fromstring(b64decode(svg)) is not None for svg in re.findall(r"image/svg\+xml;base64,([^\"]+)", text))
    assert ("blur" in text) is shifts
    assert picture.draw(one).startswith(b"\x89PNG")


def test_the_card_names_bounds_and_reasons(sweep: Sweep) -> None:
    text = card.write(report(sweep, True, True))
    assert "at most 188 of 200 (settled after 64)" in text
    assert "feedbeef: its `<head>` holds a NaN" in text
    assert text.startswith("# digits: greedy soup aaaaaaaaaaaa")


def test_card_page_csv_and_text_show_one_table_that_says_what_was_not_measured(sweep: Sweep) -> None:
    one = report(sweep, True, True).model_copy(
        update={
            "calibration": {"greedy": Calibration(before=0.0512, after=0.0217, temperature=1.5)},
            "costs": {
                "uniform": Cost(samples=12_345, seconds=6.78, peak_bytes=3_210_000_000),
                "greedy": Cost(samples=7, speculated=5, seconds=0.1, peak_bytes=None),
            },
            "unfitted": {"greedy": Accuracy(correct=91, seen=100), "learned": Accuracy(correct=90, seen=100)},
        }
    )
    best, uniform, greedy = table.rows(one)
    assert best == ["best single", "95.00", "90.00", "92.50", "60.00", "60.00", *[""] * 5]
    assert uniform[-5:] == ["", "", "12,345", "6.8", "3.21"]
    assert greedy[-5:] == ["5.12", "2.17", "7 (+5)", "0.1", "not measured"]
    for written in (card.write(one), page.write(one, sweep), table.text(one), table.as_csv(one)):
        assert all(cell in written for row in (table.head(one), uniform, greedy) for cell in row)
    assert all(note in written for written in (card.write(one), page.write(one, sweep)) for note in table.notes(one))
    assert "There are: greedy 91 of 100, learned 90 of 100." in card.write(one)
    assert "tempered" not in table.text(report(sweep, True, True)), "what nobody measured has no column for a reader"
    plain = report(sweep, False, False)
    assert (
        table.filled(plain)
        == table.scores(plain)
        == [["accuracy, %", "held_out", "gate"], *[[row[0], "95.00", "90.00"] for row in table.rows(plain)]]
    )
    assert [line[-1] for line in table.scores(one)] == ["mean shift", *["60.00"] * 3]
    assert all(cell in comparison(one) for line in table.scores(one) for cell in line)


def test_the_card_names_near_misses_better_recipes_duplicates_and_midpoints(sweep: Sweep) -> None:
    one = report(sweep, True, True)
    ids = [trial.id for trial in sweep.trials]
    near = one.steps[2].model_copy(update={"examined": 200})
    better = Scores(held_out=score(191))
    crowded = one.model_copy(
        update={
            "steps": (*one.steps[:2], near),
            "scores": one.scores | {"uniform": better},
            "duplicates": ((ids[0], ids[1]),),
            "marginal": curve([(1, score(188)), (2, score(190))], [3600.0, 1800.0]),
            "midpoints": {ids[2]: score(180)},
        }
    )
    text = card.write(crowded)
    for written in (text, page.write(crowded, sweep)):
        assert f"Greedy left out {ids[2]} at 188 of 200, 2 below" in written
        assert "Uniform has 191 of 200 on held_out, what ships 190 of 200" in written
        assert f"The same weights to the bit: {ids[0]}, {ids[1]}" in written
        assert f"Half way to {ids[2]}: 90.00 %, -5.00 points" in written
    assert "| 2 | 95.00 | 1.5 | +1.000 | +2.000 |" in text
    assert "One more trial is expected to bring 0.585 points, 0.780 an accelerator hour." in text
    assert "Near misses" not in card.write(one)
