"""Promise: a Prefect server that is away for a moment is asked again until it answers, one that refuses is not, one that stays away is a
sentence; and no picture ends a retraining, or keeps its quorum from being judged."""

import asyncio
import socket
from types import SimpleNamespace
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Scheduled

from flows import retrain
from stockpot.config import RetrainRequest
from stockpot.errors import ServerUnreachable, TooFewIngredients
from stockpot.sweeps import plan
from tasks import patience, showing
from tasks.patience import NO_ANSWER, Absence, patiently
from tests.faulty_proxy import faulty_proxy
from tests.requests_for_tests import DATA, INIT, REQUEST

SWEEP = plan(RetrainRequest.model_validate(REQUEST), DATA, INIT)


@pytest.fixture
def away(server, monkeypatch):
    """The port of this process's Prefect server, at which nothing answers; and that of the server itself."""
    monkeypatch.setattr(patience, "ASK_AGAIN_S", 0.1)
    own = urlsplit(PREFECT_API_URL.value()).port
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))  # not listening: connections are refused
        port = place.getsockname()[1]
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
        yield port, own


def test_a_cancelled_retraining_takes_its_trials_along_though_the_server_is_away_at_first(server, away, monkeypatch):
    """Called as Prefect calls the hook: outside any run."""
    ended, (port, own) = [], away
    monkeypatch.setattr(retrain, "end_cancelled_sweep", ended.append)

    async def scenario():
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{own}/api"}):
            async with get_client() as client:
                parent = await client.create_flow_run(Flow(lambda: None, name="parent"), tags=["sweep:abc"], state=Scheduled())
                child = await client.create_flow_run(Flow(lambda: None, name="child"), tags=["sweep:abc"], state=Scheduled())
        hook = asyncio.create_task(retrain.cancel_children(retrain.retrain, parent, None))
        await asyncio.sleep(0.5)
        assert not hook.done(), "it waits"
        with faulty_proxy(own, listen=port):
            await hook
            async with get_client() as client:
                return await client.read_flow_run(child.id)

    assert asyncio.run(scenario()).state.name in ("Cancelling", "Cancelled")
    assert ended == ["abc"]


def test_a_run_wears_its_tags_though_the_server_is_away_at_first(server, away, monkeypatch):
    port, own = away

    async def scenario():
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{own}/api"}):
            async with get_client() as client:
                run = await client.create_flow_run(Flow(lambda: None, name="parent"), tags=["mine"])
        monkeypatch.setattr(retrain, "runtime", SimpleNamespace(flow_run=SimpleNamespace(id=str(run.id), tags=["mine"])))
        worn = asyncio.create_task(retrain._wear_tags(SWEEP))
        await asyncio.sleep(0.5)
        assert not worn.done(), "it waits"
        with faulty_proxy(own, listen=port):
            await worn
            async with get_client() as client:
                return (await client.read_flow_run(run.id)).tags

    assert set(asyncio.run(scenario())) == {"mine", f"sweep:{SWEEP.id}", f"model:{SWEEP.request.model}"}


def test_no_picture_keeps_the_quorum_from_being_judged(away, monkeypatch):
    """The server goes for good while the trials run: their progress and their table cannot be drawn."""
    closed, warned = [], []
    monkeypatch.setattr(showing, "PICTURE_S", 0.3)
    monkeypatch.setattr(patience, "_log", lambda: SimpleNamespace(warning=lambda line, *words: warned.append(line % words)))
    monkeypatch.setattr(retrain, "finished_trials", lambda _sweep: {})
    monkeypatch.setattr(retrain, "close_sweep", lambda _sweep, status, _counts: closed.append(status))

    async def run_to_end(_jobs, *, on_change, **_options):
        await on_change([])
        return []

    monkeypatch.setattr(retrain, "run_to_end", run_to_end)
    with disable_run_logger(), pytest.raises(TooFewIngredients):
        asyncio.run(retrain.run_trials(SWEEP))
    assert closed == ["FAILED"]
    missing = [line for line in warned if "could not be drawn" in line]
    assert [line.split(" could")[0] for line in missing] == ["The progress of the sweep", "The table of trials"]


def test_a_server_that_stays_away_is_a_sentence(away):
    async def ask():
        async with get_client() as client:
            await patiently(lambda: client.read_flow_run(uuid4()), 0.3)

    with pytest.raises(ServerUnreachable, match="has not answered for 0 s"):
        asyncio.run(ask())


def test_a_server_that_refuses_is_not_asked_again(server):
    async def ask():
        async with get_client() as client:
            await patiently(lambda: client.read_flow_run(uuid4()))

    with pytest.raises(ObjectNotFound):
        asyncio.run(ask())


def test_an_absence_begins_with_a_missing_answer_and_ends_with_an_answer(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now[0]))
    absence, silence = Absence(600), httpx.ConnectError("refused")
    assert isinstance(silence, NO_ANSWER)
    for later in (0, 599):
        now[0] = 100 + later
        absence.bear(silence)
    absence.end()
    now[0] += 100
    absence.bear(silence)
    now[0] += 600
    with pytest.raises(ServerUnreachable, match="600 s"):
        absence.bear(silence)
