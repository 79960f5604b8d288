"""Promise: a stop rule that cannot be judged ends no retraining: its trials go on, and it is asked again."""

import asyncio
import logging
from concurrent.futures.process import BrokenProcessPool

import pytest

from stockpot.config import RetrainRequest
from stockpot.errors import ServerUnreachable
from stockpot.sweeps import plan
from tasks import sparing
from tests.requests_for_tests import DATA, INIT, REQUEST


@pytest.mark.parametrize("fault", [ServerUnreachable("MLflow does not answer."), BrokenProcessPool("killed for memory")])
def test_trials_go_on_while_the_rule_cannot_be_judged_and_end_by_it_afterwards(monkeypatch, caplog, fault):
    request = RetrainRequest.model_validate({**REQUEST, "fan_out": {"stop": {"below": 0.001, "after": 4}}})
    asked = []

    async def spare_rest(_sweep, finished, _folder):
        asked.append(finished)
        if len(asked) == 1:
            raise fault
        return "Enough."

    monkeypatch.setattr(sparing, "spare_rest", spare_rest)
    monkeypatch.setattr(sparing, "get_run_logger", lambda: logging.getLogger("run"))

    async def scenario():
        async with sparing.stop_rule(plan(request, DATA, INIT), before=7) as enough:
            return [await enough([]) for _ in range(3)]

    assert asyncio.run(scenario()) == [None, "Enough.", "Enough."]
    assert asked == [7, 7], "a missing answer is not kept, an answer is"
    assert f"({fault}); they go on" in caplog.text
