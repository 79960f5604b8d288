"""How a trial's run stands, where several attempts say so: each under a tag of its own, and the run as the latest of them says.

MLflow has no compare-and-set. So whoever writes reads again, until the run is as its tags say: the last to write has seen what all others
said, and an attempt that was overtaken puts right what it has overwritten.
"""

import json

from mlflow.entities import Run, RunTag

from stockpot.ledger.connection import client

STANDS = "stockpot.stands."
"""With the number of an attempt's claim behind it: the tag that says how that attempt stands."""
ROUNDS = 20
"""Writes until a run that does not become as its tags say is left to whoever else is writing, or to a server that keeps other values."""


def stand(mlflow_run_id: str, claim: int, status: str, said: dict[str, str]) -> None:
    """Say how the attempt of that claim stands, `said` in the run's own tags, and make the run stand as its latest attempt says."""
    _say(mlflow_run_id, f"{STANDS}{claim:010d}", {**said, "status": status})


def stand_finished(run: Run) -> None:
    """Let a run have ended well, whatever its latest attempt managed to say: an earlier one that wakes up cannot reopen it."""
    if name := _latest(run):
        _say(run.info.run_id, name, {**json.loads(run.data.tags[name]), "status": "FINISHED"})
    else:
        client().set_terminated(run.info.run_id, "FINISHED")


def _say(mlflow_run_id: str, name: str, said: dict[str, str]) -> None:
    ledger = client()
    ledger.set_tag(mlflow_run_id, name, json.dumps(said, ensure_ascii=False))
    for _ in range(ROUNDS):
        run = ledger.get_run(mlflow_run_id)
        latest = json.loads(run.data.tags[_latest(run)])
        wanted = latest.pop("status")
        if run.info.status != wanted:
            ledger.update_run(mlflow_run_id, wanted) if wanted == "RUNNING" else ledger.set_terminated(mlflow_run_id, wanted)
        elif latest.items() <= run.data.tags.items():
            return
        else:
            ledger.log_batch(mlflow_run_id, tags=[RunTag(tag, value) for tag, value in latest.items()])


def _latest(run: Run) -> str:
    """The tag of the highest claim; empty where no attempt said anything."""
    return max((name for name in run.data.tags if name.startswith(STANDS)), default="")
