"""One trial's run in the ledger while it trains: parameters, curves and, last, the ingredient. What a run or an ingredient is in MLflow is
told in `tracking`.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from mlflow.entities import LoggedModelOutput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException, RestException

from stockpot.config import Trial
from stockpot.digests import file_digest
from stockpot.errors import BudgetSpent, IngredientMismatch, ServerRefused, ServerUnreachable
from stockpot.ledger.connection import asking, check_server, client, create_child, experiment, find_run
from stockpot.ledger.sampling import Sampler
from stockpot.ledger.spool import Point, Spool, replay
from stockpot.ledger.tracking import INGREDIENT_FILES, dataset, flow_tags, now_ms
from stockpot.outcomes import Accuracy, Ingredient


class TrialLog:
    """The child run of one trial, open while the `with` block runs: FINISHED after it, FAILED with the reason on an error, KILLED on an
    interruption. A further attempt reopens the run of the first one, and from then on it alone says how the run ends. Metrics never stall
    or stop the trial: see `spool`. A ledger that is gone at the end costs the run its ending, which `close_sweep` makes up for.

    attempt: counts from 1. say: called with a line for what was lost. Raises `ServerUnreachable` on entering, before anything was computed.
    """

    def __init__(
        self, trial: Trial, flow_run_id: str | None = None, attempt: int = 1, say: Callable[[str], None] = lambda _line: None
    ) -> None:
        self.trial = trial
        self._say = say
        self._writer = uuid4().hex
        self._tags = {"stockpot.attempt": str(attempt), "stockpot.writer": self._writer, **flow_tags(flow_run_id)}

    def __enter__(self) -> Self:
        check_server()
        with asking():
            trial = self.trial
            tags = {"stockpot.trial": trial.id, "stockpot.index": str(trial.index)}
            run = find_run(trial.model, "trial", trial.sweep_id, f" and tags.`stockpot.trial` = '{trial.id}'")
            run = run or create_child(trial.model, f"trial {trial.index:03d} {trial.id}", "trial", trial.sweep_id, tags)
            self.mlflow_run_id = str(run.info.run_id)
            self._known_params = set(run.data.params)
            client().update_run(self.mlflow_run_id, "RUNNING")
            client().log_batch(self.mlflow_run_id, tags=[RunTag(name, value) for name, value in self._tags.items()])
            client().log_inputs(self.mlflow_run_id, [dataset("train", trial.snapshot, "training")])
        self._spool = Spool(_spool_folder() / f"{self.mlflow_run_id}.{self._writer}.jsonl", self._send)
        self._sampler = Sampler(self.metrics)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sampler.close()
        left = self._spool.close()
        if lost := self._spool.lost:
            self._say(f"{lost} points of trial {self.trial.id} were lost: the node's disk took none and the ledger did not answer in time")
        interrupted = isinstance(error, BudgetSpent) or not isinstance(error, Exception)
        status = "FINISHED" if error is None else "KILLED" if interrupted else "FAILED"
        reason = "" if error is None else (str(error) or type(error).__name__)[:5000]
        try:
            with asking():
                if client().get_run(self.mlflow_run_id).data.tags.get("stockpot.writer") != self._writer:
                    return  # a later attempt has the run
                tags = [RunTag("stockpot.reason", reason), RunTag("stockpot.undelivered_points", str(left))]
                client().log_batch(self.mlflow_run_id, tags=tags)
                client().set_terminated(self.mlflow_run_id, status)
        except (ServerUnreachable, ServerRefused, MlflowException) as silence:  # what was recorded counts, and an error is told as it is
            self._say(f"trial {self.trial.id} ended {status}, which its run does not say yet: {silence}")

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

    def record_ingredient(
        self, folder: Path, held_out: Accuracy, *, transform_digest: str, seconds: float, step: int = 0, ema_decay: float = 0.0
    ) -> Ingredient:
        """Store what the trial made (`INGREDIENT_FILES` in `folder`) as a LoggedModel. The tag written last makes it exist.

        seconds: of the whole trial. ema_decay: of the moving average it is. Raises `IngredientMismatch` when a file is missing,
        `ServerUnreachable`.
        """
        for name in INGREDIENT_FILES:
            if not (folder / name).exists():
                raise IngredientMismatch(f"Trial {self.trial.id} hands over no {name}; an ingredient is {', '.join(INGREDIENT_FILES)}.")
        with asking():
            return self._record(folder, held_out, transform_digest, seconds, step, ema_decay)

    def _record(self, folder: Path, held_out: Accuracy, transform_digest: str, seconds: float, step: int, ema_decay: float) -> Ingredient:
        trial, ledger, own = self.trial, client(), self.trial.ingredient_id(ema_decay)
        tags = {"stockpot.trial": own, "stockpot.sweep": trial.sweep_id, "stockpot.init": trial.init.digest}
        title = f"trial-{trial.index:03d}-{own}".replace(".", "_")  # a LoggedModel's name takes no dot
        model = ledger.create_logged_model(experiment(trial.model), title, self.mlflow_run_id, tags=tags, model_type="stockpot.ingredient")
        ledger.log_model_artifacts(model.model_id, str(folder))
        ledger.finalize_logged_model(model.model_id, "READY")
        ledger.log_outputs(self.mlflow_run_id, [LoggedModelOutput(model.model_id, step)])
        name, cut = "held_out", trial.snapshot.digest[:36]
        ledger.log_metric(
            self.mlflow_run_id,
            f"held_out/accuracy-ema-{ema_decay!r}" if ema_decay else "held_out/accuracy",
            held_out.value,
            step=step,
            model_id=model.model_id,
            dataset_name=name,
            dataset_digest=cut,
        )
        ingredient = Ingredient(
            trial_id=own,
            index=trial.index,
            ema_decay=ema_decay,
            model_id=model.model_id,
            mlflow_run_id=self.mlflow_run_id,
            weights_sha256=file_digest(folder / INGREDIENT_FILES[0]),
            files={name: file_digest(folder / name) for name in INGREDIENT_FILES[1:]},
            init_digest=trial.init.digest,
            transform_digest=transform_digest,
            held_out=held_out,
            settings=trial.settings,
            seconds=seconds,
            gpus=trial.gpus,
        )
        ledger.set_logged_model_tags(model.model_id, {"stockpot.ingredient": ingredient.model_dump_json()})
        return ingredient

    def _send(self, points: list[Point]) -> None:
        _send_points(self.mlflow_run_id, points)


def replay_metrics() -> int:
    """Deliver what ended trials on this node could not, and return how many points that was. Points of a run that this server does not
    know wait for the server that does, and what cannot be read or sent now waits for the next trial: it is not this one's."""
    return sum(_replayed(path) for path in sorted(_spool_folder().glob("*.jsonl")))


def _replayed(path: Path) -> int:
    with suppress(ServerUnreachable, OSError):
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
    except MlflowException as error:  # too many requests, a token that is being exchanged: not stored, so kept and sent again
        raise ServerUnreachable(f"The ledger refuses points of run {mlflow_run_id} ({str(error).splitlines()[0][:200]}).") from error
