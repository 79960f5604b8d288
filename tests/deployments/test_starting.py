"""Promise: who watches a run sees all of its children, however many, and is told where it is, with or without pages for a browser."""

from types import SimpleNamespace
from uuid import UUID

import pytest
from prefect.settings import PREFECT_UI_URL, temporary_settings

from deployments.starting import Started, _children
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
