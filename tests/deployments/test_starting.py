"""Promise: who watches a run sees all of its children, however many, how far its trials are and each sentence once, and is told where it
is, with or without pages for a browser."""

import re
from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest
from prefect.settings import PREFECT_UI_URL, temporary_settings
from prefect.states import Completed, Failed, Running

from deployments import starting
from deployments.starting import Started, _children, _plain, watch_to_end
from stockpot.errors import StockpotError
from tasks.dispatching import PAGE
from tasks.policies import flow_run_page

RUN = UUID(int=7)


@pytest.mark.parametrize("count", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 5])
def test_all_children_are_read(count):
    def read_flow_runs(*, flow_run_filter, sort, limit, offset):
        assert flow_run_filter.parent_flow_run_id.any_ == [RUN]
        assert limit <= PAGE, "more the API refuses"
        return list(range(count))[offset : offset + limit]

    assert _children(SimpleNamespace(read_flow_runs=read_flow_runs), RUN) == list(range(count))


def test_a_run_is_found_by_its_page_or_else_by_its_id():
    with temporary_settings({PREFECT_UI_URL: "http://127.0.0.1:4200"}):
        assert Started(RUN, "retrain", flow_run_page(RUN)).where == f"http://127.0.0.1:4200/runs/flow-run/{RUN}"
    assert Started(RUN, "retrain", None).where == f"flow run {RUN}"


def test_a_watcher_reads_how_far_it_is_and_every_sentence_once(capsys):
    def child(name, state):
        return SimpleNamespace(id=uuid4(), name=name, state=state)

    parent, bad = child("retrain-photos", Running()), child("trial-1-b", Failed(message="Bad numbers."))
    trials = [child("trial-0-a", Running()), bad, child("trial-1-b", Running())]  # the second trial has a second run
    show = _plain()
    show(parent, trials)
    trials[0].state, trials[2].state = Completed(), Failed(message="Bad numbers.")
    show(parent, trials)
    parent.state = Completed(message="0 of 2 trials were finished before. Version 1 of photos: Promoted.")
    show(parent, [*trials, child("soup-c", Completed(message="Version 1 of photos: Promoted."))])
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[9:] for line in lines] == [
        "trial-0-a: Running",
        "trial-1-b: Failed, 0 of 2 trials finished (Bad numbers.)",
        "trial-1-b: Running",
        "retrain-photos: Running",
        "trial-0-a: Completed, 1 of 2 trials finished",
        "trial-1-b: Failed, 1 of 2 trials finished (Bad numbers.)",
        "soup-c: Completed (Version 1 of photos: Promoted.)",
        "retrain-photos: Completed (0 of 2 trials were finished before.)",
    ]


def test_why_a_run_failed_is_told_once_and_not_beside_its_state(capsys, monkeypatch):
    failed = SimpleNamespace(id=RUN, name="retrain-photos", state=Failed(name="SnapshotMissing", message="There is no snapshot."))
    monkeypatch.setattr(starting, "_states", lambda _: [(failed, [])])
    with pytest.raises(StockpotError, match=r"^retrain-photos ended SnapshotMissing: There is no snapshot\. See flow run "):
        watch_to_end(Started(RUN, "retrain-photos", None))
    assert capsys.readouterr().out.splitlines()[0][9:] == "retrain-photos: SnapshotMissing"
