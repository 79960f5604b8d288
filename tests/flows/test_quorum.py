"""Promise: whether a soup is cooked is decided by the share of trials that finished, and the ledger says how the sweep ended."""

import pytest
from prefect.logging import disable_run_logger

from flows import retrain
from stockpot.config import FanOutSpec
from stockpot.errors import TooFewIngredients
from stockpot.ledger.connection import client
from stockpot.ledger.tracking import sweep_run
from tests.tiny_sweep import tiny_sweep


@pytest.mark.parametrize(
    ("quorum", "finished", "spared", "needed"),
    [(0.28, 7, 0, 7), (0.28, 6, 0, 7), (1.0, 25, 0, 25), (1.0, 24, 0, 25), (1.0, 20, 5, 20), (0.0, 0, 0, 1)],
)
def test_the_quorum_decides_names_what_failed_and_ends_the_sweep(ground, ledger, monkeypatch, quorum, finished, spared, needed):
    monkeypatch.setattr(retrain, "close_sweep", retrain.close_sweep.fn)
    planned = tiny_sweep(ground, f"quorum-{quorum}-{finished}-{spared}", 25)
    sweep = planned.model_copy(update={"request": planned.request.model_copy(update={"fan_out": FanOutSpec(quorum=quorum)})})
    failed = {trial.id: "No module named 'nowhere'." for trial in sweep.trials[finished + spared :]}
    with disable_run_logger():
        if finished >= needed:
            retrain.require_quorum(sweep, finished, failed, spared)
        else:
            with pytest.raises(
                TooFewIngredients, match=f"{finished} of 25 trials of sweep {sweep.id} finished, {needed} are needed"
            ) as caught:
                retrain.require_quorum(sweep, finished, failed, spared)
            assert str(caught.value).count("nowhere") == 1, "one reason, said once"
            assert all(trial in str(caught.value) for trial in failed)
    run = client().get_run(sweep_run(sweep.id).info.run_id)
    assert run.info.status == ("FINISHED" if finished >= needed else "FAILED")
    counts = {"trials": 25, "finished": finished, "failed": len(failed), "not_needed": spared}
    assert {name: run.data.metrics[f"sweep/{name}"] for name in counts} == counts
