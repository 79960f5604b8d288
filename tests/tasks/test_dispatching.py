"""Promise: a sweep's trials are each brought to an end. A crash is tried again, later and not for ever; a trial's own fault is final;
a deadline cancels what still runs of its own sweep; runs that an earlier parent left behind are waited for, not doubled.

A real Prefect server and its real API; the worker is played by the test, which sets the states a worker would report.
"""

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.states import Cancelled, Completed, Crashed, Failed, Running

from stockpot.errors import BadRequest
from tasks import dispatching
from tasks.dispatching import Job, run_to_end, unfinished_runs
from tests.waiting import PATIENCE_S


@flow
def nothing(number: int, attempt: int = 1) -> None:
    """Never executed: its runs' states are set by the tests."""


@pytest.fixture(scope="module", autouse=True)
def _deployed(deploy):
    deploy(nothing, "here")


def jobs(*numbers, sweep):
    return [Job(f"{sweep}-{n}", "nothing/here", {"number": n}, f"job-{n}", f"trial:{sweep}-{n}", (f"sweep:{sweep}",)) for n in numbers]


async def play(sweep, script, also="nothing"):
    """Act as the worker: for each attempt of a job that appears, report the next state of its script. One that never appears is a fault."""
    scripts, seen = {name: list(states) for name, states in script.items()}, set()
    delays = []
    async with asyncio.timeout(PATIENCE_S), get_client() as client:
        while any(scripts.values()):
            for run in await unfinished_runs(client, f"sweep:{sweep}", also):
                left = scripts.get(run.name.split("-attempt")[0])
                if run.id not in seen and left:
                    seen.add(run.id)
                    delays.append((run.name, (run.expected_start_time - datetime.now(UTC)).total_seconds()))
                    await client.set_flow_run_state(run.id, Running(), force=True)
                    if (state := left.pop(0)) is not None:
                        await client.set_flow_run_state(run.id, state, force=True)
            await asyncio.sleep(0.2)
    return delays


async def run(sweep, script, **options):
    wanted = jobs(*sorted({int(name.split("-")[1]) for name in script}), sweep=sweep)

    @flow
    async def parent():
        return await run_to_end(wanted, **{"attempts": 3, "retry_delay_s": 60, **options})

    outcomes, delays = await asyncio.gather(parent(), play(sweep, script))
    return {one.job.name: one for one in outcomes}, delays


def test_a_crash_is_tried_again_after_the_delay(server):
    outcomes, delays = asyncio.run(run("crash", {"job-1": [Crashed(message="exit code -9"), Completed()], "job-2": [Completed()]}))
    assert {name: (one.state, one.attempt) for name, one in outcomes.items()} == {"job-1": ("finished", 2), "job-2": ("finished", 1)}
    assert dict(delays)["job-1-attempt-2"] > 10


def test_attempts_end_where_nothing_got_further_and_starts_wherever_also_across_parents(server):
    """All jobs crashed after 7 steps while no parent looked on. Then job 1 gets no further, job 2 in every run, and job 3 finds all GPUs of
    its node held once."""
    steps = {"job-1": iter([7, 7]), "job-2": iter([7, 8, 9]), "job-3": iter([7, 7])}
    wanted = jobs(1, 2, 3, sweep="away")

    async def progress(job):
        return next(steps[job.name])

    @flow
    async def lost_parent():
        for job in wanted:
            await dispatching._submit(job, None, 0)

    @flow
    async def next_parent():
        return await run_to_end(wanted, attempts=1, starts=3, retry_delay_s=60, progress=progress, deadline_s=PATIENCE_S)

    async def scenario():
        crash, busy = Crashed(message="exit code -9"), Failed(name="DeviceBusy", message="2 of 2 GPUs of this node are held")
        await lost_parent()
        await play("away", {f"job-{n}": [crash] for n in (1, 2, 3)})
        script = {"job-1": [crash], "job-2": [crash, crash], "job-3": [busy, Completed(message="done")]}
        return await asyncio.gather(next_parent(), play("away", script))

    outcomes, delays = asyncio.run(scenario())
    assert [(one.state, one.attempt) for one in outcomes] == [("failed", 2), ("failed", 3), ("finished", 3)]
    assert [one.reason for one in outcomes] == ["exit code -9 (attempt 1 of 1)", "exit code -9 (started 3 times)", "done"]
    assert len(delays) == 5
    assert all(delay > 10 for _, delay in delays), "an instant retry can kill the worker"


@pytest.mark.slow
def test_two_parents_that_ask_for_an_equal_job_at_once_share_its_runs(server):
    """They belong to different sweeps; the run crashes once, and its successor is shared too."""
    (one,) = jobs(1, sweep="shared")
    wanted = [replace(one, tags=(f"sweep:shared-{number}",)) for number in (1, 2)]
    dispatched, both = set[str](), asyncio.Event()

    async def parent(job):
        async def note(_outcomes):
            dispatched.update(job.tags)
            if len(dispatched) == 2:
                both.set()

        return (await run_to_end([job], attempts=3, retry_delay_s=1, on_change=note))[0]

    async def worker():
        await both.wait()
        for state in (Crashed(message="exit code -9"), Completed(message="done")):
            await play("shared-1", {"job-1": [state]}, also="sweep:shared-2")

    async def scenario():
        *outcomes, _ = await asyncio.gather(*(flow(parent)(job) for job in wanted), worker())
        async with get_client() as client:
            found = FlowRunFilter(tags=FlowRunFilterTags(all_=[one.tag]))
            return outcomes, await client.read_flow_runs(flow_run_filter=found, sort="ID_DESC", limit=10)

    outcomes, runs = asyncio.run(scenario())
    assert [(one.state, one.reason, one.attempt) for one in outcomes] == [("finished", "done", 2)] * 2
    assert len(runs) == 2


def test_an_unexpected_failure_is_tried_again_but_a_stated_one_is_final(server):
    stated = Failed(name="NonFinite", message="The loss of trial 1 is nan at step 7.")
    outcomes, _ = asyncio.run(run("stated", {"job-1": [stated], "job-2": [Failed(message="ConnectionError"), Completed()]}))
    assert (outcomes["job-1"].state, outcomes["job-1"].attempt) == ("failed", 1)
    assert outcomes["job-1"].reason == "The loss of trial 1 is nan at step 7."
    assert (outcomes["job-2"].state, outcomes["job-2"].attempt) == ("finished", 2)


def test_a_trial_cancelled_by_hand_is_final(server):
    outcomes, _ = asyncio.run(run("hand", {"job-1": [Cancelled(message="by hand")]}))
    assert (outcomes["job-1"].state, outcomes["job-1"].reason) == ("failed", "by hand")


def test_the_deadline_cancels_what_still_runs_and_counts_it_as_late(server, monkeypatch):
    """Its hours have passed once job 2 has finished."""
    began, passed = time.monotonic(), []
    monkeypatch.setattr(dispatching, "time", SimpleNamespace(monotonic=lambda: began + sum(passed)))

    async def pass_hours(outcomes):
        if any(one.state == "finished" for one in outcomes):
            passed.append(7200)

    script = {"job-1": [None], "job-2": [Completed()]}
    outcomes, _ = asyncio.run(run("late", script, deadline_s=3600, on_change=pass_hours))
    assert {name: one.state for name, one in outcomes.items()} == {"job-1": "late", "job-2": "finished"}
    assert "deadline of 3600 s" in outcomes["job-1"].reason

    async def state():
        async with get_client() as client:
            return (await client.read_flow_run(outcomes["job-1"].flow_run_id)).state.name

    assert asyncio.run(state()) in ("Cancelling", "Cancelled")


def test_runs_of_an_earlier_parent_are_waited_for_not_doubled(server):
    async def scenario():
        wanted, looked_around = jobs(1, sweep="orphan"), asyncio.Event()

        @flow
        async def lost_parent():
            await dispatching._submit(wanted[0], None, 0)

        @flow
        async def next_parent():
            return await run_to_end(wanted, attempts=3, retry_delay_s=5, on_change=note)

        async def note(_outcomes):
            looked_around.set()

        async def worker():
            await looked_around.wait()
            await play("orphan", {"job-1": [Completed()]})

        await lost_parent()
        outcomes, _ = await asyncio.gather(next_parent(), worker())
        async with get_client() as client:
            everything = await client.read_flow_runs(
                flow_run_filter=FlowRunFilter(tags={"all_": ["sweep:orphan"]}), sort="ID_DESC", limit=10
            )
        return outcomes, everything

    outcomes, everything = asyncio.run(scenario())
    assert [one.state for one in outcomes] == ["finished"]
    assert len(everything) == 1


def test_who_has_had_enough_of_the_run_of_another_sweep_leaves_it_to_that(server):
    """It is late for one sweep, not needed by a second, and finished for its own, which allows it no second attempt."""
    (job,) = jobs(1, sweep="lent")
    dispatched, left = asyncio.Event(), []

    @flow
    async def owner():
        async def note(_outcomes):
            dispatched.set()

        return await run_to_end([job], attempts=1, retry_delay_s=1, on_change=note)

    async def enough(_outcomes):
        return "enough is enough"

    @flow
    async def guest(name, **has_had_enough):
        return await run_to_end([replace(job, tags=(f"sweep:{name}",))], attempts=1, retry_delay_s=1, **has_had_enough)

    async def guests_then_worker():
        await dispatched.wait()
        left.extend(await guest("content", enough=enough) + await guest("hasty", deadline_s=0))
        await play("lent", {"job-1": [Completed(message="done")]})

    async def scenario():
        return (await asyncio.gather(owner(), guests_then_worker()))[0]

    (own,) = asyncio.run(scenario())
    assert [one.state for one in left] == ["not needed", "late"]
    assert {one.flow_run_id for one in left} == {own.flow_run_id}
    assert (own.state, own.reason, own.attempt) == ("finished", "done", 1)


def test_what_no_worker_has_taken_is_not_needed_once_there_is_enough(server):
    """Job 1 finishes, job 2 is running then, jobs 3 and 4 wait for a slot."""

    async def enough(outcomes):
        return "enough is enough" if any(one.state == "finished" for one in outcomes) else None

    @flow
    async def parent():
        return await run_to_end(jobs(1, 2, 3, 4, sweep="spared"), attempts=3, retry_delay_s=1, enough=enough)

    async def workers():
        await play("spared", {"job-2": [None]})
        await play("spared", {"job-1": [Completed()]})
        async with get_client() as client:
            left = await unfinished_runs(client, "sweep:spared")
            while len(left) > 1:
                await asyncio.sleep(0.2)
                left = await unfinished_runs(client, "sweep:spared")
            await client.set_flow_run_state(left[0].id, Crashed(message="exit code -9"), force=True)
        await play("spared", {"job-2": [Completed()]})  # its second attempt

    async def scenario():
        outcomes, _ = await asyncio.gather(parent(), workers())
        async with get_client() as client:
            wanted = FlowRunFilter(tags={"all_": ["sweep:spared"]})
            return outcomes, {run.name: run for run in await client.read_flow_runs(flow_run_filter=wanted, sort="ID_DESC", limit=10)}

    outcomes, runs = asyncio.run(scenario())
    assert [one.state for one in outcomes] == ["finished", "finished", "not needed", "not needed"]
    assert [one.reason for one in outcomes[2:]] == ["enough is enough"] * 2
    assert outcomes[1].attempt == 2, "what was started is seen through"
    assert [runs[name].state.type.value for name in ("job-3", "job-4")] == ["CANCELLED"] * 2
    assert runs["job-3"].state.message == "enough is enough"


def test_where_there_is_enough_before_nothing_is_dispatched_and_what_runs_is_waited_for(server):
    looked_around = asyncio.Event()

    async def enough(outcomes):
        return "enough is enough"

    async def note(_outcomes):
        looked_around.set()

    @flow
    async def lost_parent():
        await dispatching._submit(jobs(1, sweep="enough")[0], None, 0)

    @flow
    async def next_parent():
        return await run_to_end(jobs(1, 2, sweep="enough"), attempts=3, retry_delay_s=5, enough=enough, on_change=note)

    async def scenario():
        await lost_parent()
        await play("enough", {"job-1": [None]})

        async def worker():
            await looked_around.wait()
            async with get_client() as client:
                (run,) = await unfinished_runs(client, "sweep:enough")
                await client.set_flow_run_state(run.id, Completed(), force=True)

        outcomes, _ = await asyncio.gather(next_parent(), worker())
        return outcomes

    assert [(one.job.name, one.state) for one in asyncio.run(scenario())] == [("job-1", "finished"), ("job-2", "not needed")]


def test_who_asks_for_the_same_run_of_a_job_gets_one_run(server):
    """Two retrainings at once, and each again, as a retried parent does: one first run, and one after it."""
    (wanted,) = jobs(1, sweep="twice")

    @flow
    async def parent():
        one, again = [await dispatching._submit(wanted, None, 0) for _ in range(2)]
        return {one.id, again.id, (await dispatching._submit(wanted, one, 0)).id}

    async def scenario():
        return await asyncio.gather(parent(), parent())

    one, other = asyncio.run(scenario())
    assert one == other
    assert len(one) == 2


def test_a_missing_deployment_is_one_sentence(server):
    @flow
    async def parent():
        await run_to_end([Job("k", "nothing/nowhere", {}, "n", "trial:k", ())], attempts=1, retry_delay_s=1)

    with pytest.raises(BadRequest, match="no deployment `nothing/nowhere`; run `stockpot deploy`"):
        asyncio.run(parent())
