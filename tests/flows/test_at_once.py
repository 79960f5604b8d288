"""Promise: two retrainings, or two soups, of one model at the same time end as one version for each different soup, one champion and no
trial trained twice.

Everything is real: servers, workers, processes."""

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags

from deployments.starting import start, watch_to_end
from stockpot.config import SoupSpec
from stockpot.ledger import champions, registry, tracking
from stockpot.ledger.connection import client

pytestmark = [pytest.mark.slow, pytest.mark.stack, pytest.mark.timeout(2400)]

MODEL = "at-once"


def soup(sweep_id):
    return start("soup/stockpot", {"sweep_id": sweep_id}, name=f"soup-{sweep_id}", tags=[f"sweep:{sweep_id}", f"model:{MODEL}"])


def retrain(request):
    return start("retrain/stockpot", {"request": request.model_dump(mode="json")}, name=f"retrain-{MODEL}", tags=[])


def test_two_of_everything_at_once(stack, request_for):
    greedy = request_for(MODEL, seeds=(1, 2))
    uniform = greedy.model_copy(update={"soup": SoupSpec(recipe="uniform")})
    sweeps = [watch_to_end(one) for one in [retrain(greedy), retrain(uniform)]]
    reports = [tracking.read_report(sweep) for sweep in sweeps]
    with get_client(sync_client=True) as prefect:
        runs = prefect.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[f"model:{MODEL}"])))
    trials = [run.name for run in runs if run.name.startswith("trial-")]
    assert len(set(trials)) == 2
    assert len(tracking.find_ingredients(tracking.read_sweep(sweeps[0]))) == 2

    ended = [watch_to_end(one) for one in [soup(sweep) for sweep in sweeps * 2]]
    assert ended == sweeps * 2
    soups = {report.soup_sha256 for report in reports}
    versions = client().search_model_versions(f"name = '{MODEL}'")
    assert {one.tags["stockpot.soup_sha256"] for one in versions} == soups
    assert len(versions) == len(soups), "one version for each different soup"
    assert [tracking.read_report(sweep) for sweep in sweeps] == reports, "nothing was cooked again"
    history = champions.read_history(MODEL)
    assert history[-1]["after"] == registry.alias_version(MODEL, "champion")
    assert len({line["after"] for line in history}) == len(history), "no alias moved twice"
