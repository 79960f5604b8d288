"""One trial's run in the ledger while it trains: its parameters, its curves and how it ends. What a run is in MLflow is told in `tracking`,
how an ingredient comes into it in `recording`.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException, RestException

from stockpot.config import Trial
from stockpot.errors import BudgetSpent, ServerRefused, ServerUnreachable
from stockpot.ledger.connection import asking, check_server, client, create_child, find_run
from stockpot.ledger.sampling import Sampler
from stockpot.ledger.spool import Point, Spool, replay
from stockpot.ledger.standing import stand
from stockpot.ledger.tracking import dataset, flow_tags, now_ms

REASON = 3000
"""Characters of a reason that are kept: with all that is escaped it must fit into a run's tag."""


class TrialLog:
    """The child run of one trial, open while the `with` block runs: FINISHED after it, FAILED with the reason on an error, KILLED on an
    interruption. A further attempt reopens the run of the first one, and from then on it alone says how the run ends. Metrics never stall
    or stop the trial: see `spool`. A ledger that is gone at the end costs the run its ending, which `close_sweep` makes up for.

    attempt: as the fan-out counts, from 1. claim: of this attempt on the trial; the highest is the latest. say: called with a line for what
    was lost. Raises `ServerUnreachable` on entering, before anything was computed.
    """

    def __init__(
        self,
        trial: Trial,
        flow_run_id: str | None = None,
        attempt: int = 1,
        say: Callable[[str], None] = lambda _line: None,
        *,
        claim: int,
    ) -> None:
        self.trial = trial
        self._say = say
        self._claim = claim
        self._about = {"stockpot.attempt": str(attempt), **flow_tags(flow_run_id)}

    def __enter__(self) -> Self:
        check_server()
        with asking():
            run = self._run()
            self.mlflow_run_id = str(run.info.run_id)
            self._known_params = set(run.data.params)
            self._stand("RUNNING")
            client().log_inputs(self.mlflow_run_id, [dataset("train", self.trial.snapshot, "training")])
        self._spool = Spool(_spool_folder() / f"{self.mlflow_run_id}.{uuid4().hex}.jsonl", self._send)
        self._sampler = Sampler(self.metrics)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sampler.close()
        left = self._spool.close()
        if lost := self._spool.lost:
            self._say(f"{lost} points of trial {self.trial.id} were lost: the node's disk took none and the ledger did not answer in time")
        interrupted = isinstance(error, BudgetSpent) or not isinstance(error, Exception)
        status = "FINISHED" if error is None else "KILLED" if interrupted else "FAILED"
        try:
            with asking():
                self._stand(status, "" if error is None else (str(error) or type(error).__name__)[:REASON], left)
        except (ServerUnreachable, ServerRefused, MlflowException) as silence:  # what was recorded counts, and an error is told as it is
            self._say(f"trial {self.trial.id} ended {status}, which its run does not say yet: {silence}")

    def _run(self) -> Run:
        """The trial's run, created where there is none. Of those that attempts created at once the oldest stays, or of equally old ones the
        one of the lowest id, as MLflow orders them; each attempt deletes no other than its own."""
        trial = self.trial
        condition = f" and tags.`stockpot.trial` = '{trial.id}'"
        if found := find_run(trial.model, "trial", trial.sweep_id, condition):
            return found
        tags = {"stockpot.trial": trial.id, "stockpot.index": str(trial.index)}
        made = create_child(trial.model, f"trial {trial.index:03d} {trial.id}", "trial", trial.sweep_id, tags)
        first = find_run(trial.model, "trial", trial.sweep_id, condition)
        if first is None or first.info.run_id == made.info.run_id:
            return made
        client().delete_run(made.info.run_id)
        return first

    def _stand(self, status: str, reason: str = "", undelivered: int = 0) -> None:
        said = {**self._about, "stockpot.reason": reason, "stockpot.undelivered_points": str(undelivered)}
        stand(self.mlflow_run_id, self._claim, status, said)

    def params(self, values: dict[str, Any]) -> None:
        """Log parameters; those of an earlier attempt stay as they are. Raises `ServerUnreachable`."""
        new = [Param(name, str(value)) for name, value in values.items() if name not in self._known_params]
        with asking():
            for start in range(0, len(new), 100):
                client().log_batch(self.mlflow_run_id, params=new[start : start + 100])
        self._known_params.update(values)

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Keep one value per curve (`train/loss`, `held_out/accuracy`) at an optimiser step: returns at once, whatever the network does."""
        now = now_ms()
        self._spool.add([Point(name, float(value), now, step) for name, value in values.items()])

    def _send(self, points: list[Point]) -> None:
        _send_points(self.mlflow_run_id, points)


def replay_metrics() -> int:
    """Deliver what ended trials on this node could not, and return how many points that was. Points of a run that this server does not
    know wait for the server that does, and what cannot be read or sent now waits for the next trial: it is not this one's."""
    return sum(_replayed(path) for path in sorted(_spool_folder().glob("*.jsonl")))


def _replayed(path: Path) -> int:
    with suppress(ServerUnreachable, ServerRefused, OSError):
        return replay(path, partial(_send_points, _run_of(path))) if _known(_run_of(path)) else 0
    return 0


def _run_of(path: Path) -> str:
    """The MLflow run whose points a spool file holds."""
    return path.name.split(".")[0]


def _known(mlflow_run_id: str) -> bool:
    try:
        with asking():
            return bool(client().get_run(mlflow_run_id).info.lifecycle_stage == "active")
    except RestException:
        return False


def _spool_folder() -> Path:
    """Where points wait on this node."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stockpot" / "spool"


def _send_points(mlflow_run_id: str, points: list[Point]) -> None:
    try:
        with asking():
            client().log_batch(mlflow_run_id, metrics=[Metric(*point) for point in points])
    except (ServerRefused, MlflowException) as error:  # a token that is being exchanged, too many requests: not stored, so sent again
        raise ServerUnreachable(f"The ledger refuses points of run {mlflow_run_id} ({str(error).splitlines()[0][:200]}).") from error
