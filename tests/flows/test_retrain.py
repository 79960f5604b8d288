"""Promise: one request ends as one registered version, whatever dies on the way, and nothing is done or registered twice.

Everything is real: servers, workers, trial processes, SIGKILL.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Cancelling

from deployments.demo.digits import test_pictures as pictures
from deployments.starting import start, watch_to_end
from deployments.tables import sweep_document, sweep_text
from stockpot.errors import StockpotError
from stockpot.ledger import registry, tracking
from stockpot.ledger.connection import client
from stockpot.soup import table
from tasks.showing import percent
from tests.waiting import until

pytestmark = [pytest.mark.stack, pytest.mark.timeout(2400)]

STRANGER = Path(__file__).parents[2] / "deployments" / "demo" / "stranger.py"


def retrain(request):
    return start("retrain/stockpot", {"request": request.model_dump(mode="json")}, name=f"retrain-{request.model}", tags=[])


def runs_of(tag):
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]))
        return client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=50)


def running_trials(model, count):
    """The trial runs of a model once `count` of them are training, with their process ids."""

    def look():
        runs = [
            run for run in runs_of(f"model:{model}") if run.name.startswith("trial-") and run.state.is_running() and run.infrastructure_pid
        ]
        return runs if len(runs) >= count else None

    return until(look)


def trained(model):
    """The MLflow run of a model's only trial, once it has logged steps."""
    home = client().get_experiment_by_name(model)
    runs = client().search_runs([home.experiment_id], "tags.`stockpot.kind` = 'trial'") if home else []
    return next((one.info.run_id for one in runs if "train/loss" in one.data.metrics), None)


def pid(run):
    return int(run.infrastructure_pid.split(":")[-1])


def artifacts(prefix):
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/latest/filter", json={"limit": 200}).json()
    return {one["key"]: one for one in found if one["key"].startswith(prefix)}


def test_a_request_becomes_a_champion_that_a_stranger_can_load(stack, request_for, tmp_path):
    request = request_for("whole", seeds=(1, 2))
    sweep_id = watch_to_end(retrain(request))

    sweep, report = tracking.read_sweep(sweep_id), tracking.read_report(sweep_id)
    assert report is not None
    ingredients = tracking.find_ingredients(sweep)
    version = registry.find_version("whole", report.soup_sha256)
    assert version is not None
    assert {one.trial_id for one in ingredients} == {trial.id for trial in sweep.trials}
    assert (version.version, version.alias) == (1, "champion")
    assert set(report.scores) == {"best_single", "uniform", "greedy"}
    assert report.scores["greedy"].held_out.correct >= report.scores["best_single"].held_out.correct

    shown = artifacts("s")
    for key in (
        f"sweep-{sweep_id}-trials",
        f"sweep-{sweep_id}-progress",
        f"soup-{sweep_id}-decisions",
        f"soup-{sweep_id}-picture",
        f"soup-{sweep_id}-report",
    ):
        assert key in shown
    assert shown[f"sweep-{sweep_id}-progress"]["data"] == 100
    assert f"({tracking.report_page(report)})" in shown[f"soup-{sweep_id}-report"]["data"]
    head, *rows = table.filled(report, percent)
    assert json.loads(shown[f"soup-{sweep_id}-scores"]["data"]) == [dict(zip(head, row, strict=True)) for row in rows]

    for number, (png, label) in enumerate(pictures(10)):
        (tmp_path / f"{number:03d}-{label}.png").write_bytes(png)
    environ = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    command = [sys.executable, "-I", str(STRANGER), "models:/whole@champion", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout.splitlines()[-1])
    assert sum(label == answer for label, answer in answers) == report.scores["greedy"].test.correct

    # the same request again: no trial runs, no version
    before = len(runs_of(f"sweep:{sweep_id}"))
    second = retrain(request)
    assert watch_to_end(second) == sweep_id
    with get_client(sync_client=True) as client:
        said = client.read_flow_run(second.id).state.message
    assert "2 of 2 trials were finished before. Version 1 of whole: " in said
    again = [run.name for run in runs_of(f"sweep:{sweep_id}")][before:]
    assert not [name for name in again if name.startswith("trial-")]
    assert registry.find_version("whole", report.soup_sha256) == version
    assert tracking.read_report(sweep_id) == report


@pytest.mark.slow
def test_a_trial_that_fails_by_its_own_fault_is_counted_and_the_quorum_decides(stack, request_for):
    mixed = {"seeds": (1, 2, 3), "augmentations": ("none", "nowhere.augment:missing")}
    lenient = request_for("mixed", **mixed, quorum=0.25)
    sweep_id = watch_to_end(retrain(lenient))
    failing = [trial.id for trial in tracking.read_sweep(sweep_id).trials if "nowhere" in trial.settings.augmentation]
    assert 0 < len(failing) < 3
    rows = {row["trial"]: row["ended"] for row in json.loads(artifacts(f"sweep-{sweep_id}-trials")[f"sweep-{sweep_id}-trials"]["data"])}
    assert all("nowhere" in rows[trial] for trial in failing)
    for trial in failing:
        assert len(runs_of(f"trial:mixed:{trial}")) == 1, "a trial's own fault is not worth a second attempt"

    strict = lenient.model_copy(update={"fan_out": lenient.fan_out.model_copy(update={"quorum": 1.0})})
    with pytest.raises(StockpotError, match=f"{3 - len(failing)} of 3 trials of sweep {sweep_id} finished, 3 are needed") as caught:
        watch_to_end(retrain(strict))
    assert all(trial in str(caught.value) for trial in failing)


@pytest.mark.slow
def test_a_sweep_that_gains_nothing_more_starts_no_further_trial_and_none_when_asked_again(stack, request_for):
    seeds = tuple(range(1, 9))
    request = request_for("spared", seeds=seeds, stop={"below": 0.9, "after": 2})
    started = retrain(request)
    sweep_id = watch_to_end(started)
    sweep = tracking.read_sweep(sweep_id)
    enough, finished = tracking.read_enough(sweep), {one.trial_id for one in tracking.find_ingredients(sweep)}
    assert enough is not None
    assert 2 <= len(finished) < len(seeds)
    spared = len(seeds) - len(finished)
    document = sweep_document(sweep_id)
    assert [row["reason"] for row in document["trials"] if row["state"] == "not needed"] == [enough.reason] * spared
    assert enough.reason in sweep_text(document)
    shown = artifacts(f"sweep-{sweep_id}")
    rows = json.loads(shown[f"sweep-{sweep_id}-trials"]["data"])
    assert sum(row["ended"] == f"not needed: {enough.reason}" for row in rows) == spared
    assert f"{spared} of them not needed: {enough.reason}" in shown[f"sweep-{sweep_id}-progress"]["description"]
    run = client().get_run(tracking.open_sweep(sweep))
    assert run.data.metrics["sweep/not_needed"] == spared
    assert enough.reason in run.data.tags["mlflow.note.content"]
    with get_client(sync_client=True) as prefect:
        assert f"{spared} were not needed" in prefect.read_flow_run(started.id).state.message

    before = len(runs_of(f"sweep:{sweep_id}"))
    assert watch_to_end(retrain(request)) == sweep_id
    assert not [run.name for run in runs_of(f"sweep:{sweep_id}")[before:] if run.name.startswith("trial-")]
    assert {one.trial_id for one in tracking.find_ingredients(sweep)} == finished


@pytest.mark.slow
def test_a_killed_trial_is_started_again_and_the_sweep_ends_complete(stack, request_for):
    started = retrain(request_for("killed", seeds=(5,), epochs=400))
    (run,) = running_trials("killed", 1)
    until(lambda: trained("killed"))
    os.kill(pid(run), signal.SIGKILL)
    sweep_id = watch_to_end(started)
    attempts = [one for one in runs_of(f"sweep:{sweep_id}") if one.name.startswith("trial-")]
    assert [(one.state.type.value, "attempt-2" in one.name) for one in attempts] == [("CRASHED", False), ("COMPLETED", True)]
    delay = (attempts[1].expected_start_time - attempts[0].end_time).total_seconds()
    assert delay > 3, "the next attempt waits"
    assert len(tracking.find_ingredients(tracking.read_sweep(sweep_id))) == 1


@pytest.mark.slow
def test_cancelling_the_parent_cancels_its_children(stack, request_for):
    started = retrain(request_for("cancelled", seeds=(6, 7), epochs=5000))
    children = running_trials("cancelled", 2)
    pids = [pid(run) for run in children]
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(started.id, Cancelling())
    until(lambda: all(run.state.is_cancelled() for run in runs_of("model:cancelled")))
    until(lambda: not any(psutil.pid_exists(number) for number in pids))


@pytest.mark.slow
def test_a_schedule_becomes_a_run(stack):
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("retrain/stockpot")
        cron = CronSchedule(cron="0 3 1 1 *")
        (schedule,) = client.create_deployment_schedules(deployment.id, [(cron, True)])
        try:
            of_it = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
            scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
            (run, *_) = until(lambda: client.read_flow_runs(deployment_filter=of_it, flow_run_filter=scheduled))
            assert (run.auto_scheduled, run.expected_start_time.month, run.expected_start_time.hour) == (True, 1, 3)
        finally:
            client.delete_deployment_schedule(deployment.id, schedule.id)


@pytest.mark.slow
def test_a_trial_that_shows_no_sign_of_life_is_given_up_and_started_again(stack, request_for):
    """A stopped process is what a vanished node looks like from the servers: no end, no heartbeat, a run that stays Running."""
    started = retrain(request_for("frozen", seeds=(9,), epochs=400))
    (run,) = running_trials("frozen", 1)
    until(lambda: trained("frozen"))
    frozen = pid(run)
    os.kill(frozen, signal.SIGSTOP)
    try:
        sweep_id = watch_to_end(started)
    finally:
        os.kill(frozen, signal.SIGKILL)
    attempts = [one for one in runs_of(f"sweep:{sweep_id}") if one.name.startswith("trial-")]
    assert [one.state.type.value for one in attempts] == ["CRASHED", "COMPLETED"]
    assert "No sign of life" in attempts[0].state.message
    assert len(tracking.find_ingredients(tracking.read_sweep(sweep_id))) == 1


@pytest.mark.slow
def test_a_retraining_whose_parent_died_is_taken_up_without_doubling_its_trials(stack, request_for):
    request = request_for("orphaned", seeds=(8,), epochs=100)
    first = retrain(request)
    (child,) = running_trials("orphaned", 1)
    with get_client(sync_client=True) as client:
        os.kill(pid(client.read_flow_run(first.id)), signal.SIGKILL)
    sweep_id = watch_to_end(retrain(request))
    trials = [run.id for run in runs_of(f"sweep:{sweep_id}") if run.name.startswith("trial-")]
    assert trials == [child.id]


@pytest.mark.parametrize(
    ("environ", "change", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, {}, "refused"),
        ({}, {"store": "s3://no-such-bucket/store"}, "no-such-bucket"),
        ({}, {"data": {"snapshot": "s3://stockpot/nothing/here"}}, "s3://stockpot/nothing/here"),
        ({}, {"data": {"snapshot": f"s3://stockpot/digits-10/digits/snapshots/{'0' * 64}.json"}}, "0000"),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, {}, "MLFLOW_TRACKING_URI=http://127.0.0.1:9"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, {}, "127.0.0.1:9"),
        ({}, {"base": {"arch": "ViT-B-33"}}, "There is no architecture `ViT-B-33`; did you mean"),
        ({}, {"sweep": {"trials": 3, "space": {"seed": {"choice": [1, 2]}}}}, "has fewer than 3 different trials"),
    ],
)
def test_what_is_not_there_is_one_sentence_before_anything_starts(
    stack, request_for, stockpot, tmp_path, monkeypatch, environ, change, said
):
    for name, value in (stack.environ | environ).items():
        monkeypatch.setenv(name, value)
    document = request_for("refused", seeds=(9,)).model_dump(mode="json") | change
    (tmp_path / "request.yaml").write_text(json.dumps(document))
    code, out, err = stockpot("retrain", tmp_path / "request.yaml")
    assert (code, out) == (1, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not runs_of("model:refused")
