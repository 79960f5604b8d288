"""The ledger, on MLflow: experiment = model name, parent run = sweep, child run = trial or soup, LoggedModel = ingredient.

A trial id is found within its experiment, so a trial finished for one sweep is finished for every sweep of that model. An ingredient
exists once its LoggedModel is READY and carries the tag `stockpot.ingredient`: that tag is written last. Every run carries `stockpot.kind`
(sweep, trial, soup) and `stockpot.sweep`.
"""

import json
import os
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from uuid import uuid4

from mlflow.artifacts import download_artifacts
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, RunTag
from mlflow.exceptions import RestException

from stockpot.config import PinnedSnapshot, Sweep, Trial
from stockpot.digests import file_digest
from stockpot.errors import BudgetSpent, IngredientMismatch, ServerUnreachable
from stockpot.ledger.connection import (
    address,
    asking,
    check_server,
    client,
    create_child,
    create_run,
    experiment,
    find_run,
    of_kind,
    read_file,
    search_models,
    search_runs,
    sweep_run,
)
from stockpot.ledger.sampling import Sampler
from stockpot.ledger.spool import Point, Spool, replay
from stockpot.outcomes import Accuracy, Ingredient, SoupReport, SweepSummary

__all__ = ["TrialLog", "check_server", "close_sweep", "fetch_ingredient", "find_ingredient", "find_ingredients", "list_sweeps",
           "open_sweep", "read_report", "read_sweep", "record_report"]  # fmt: skip

INGREDIENT_FILES = ("model.safetensors", "held_out.safetensors", "card.json", "model.json", "fingerprint.json")
Status = Literal["FINISHED", "FAILED", "KILLED"]


def open_sweep(sweep: Sweep, flow_run_id: str | None = None) -> str:
    """The MLflow run of a sweep: created with `sweep.json`, or reopened. Returns its id."""
    with asking():
        found = find_run(sweep.request.model, "sweep", sweep.id)
        run = found or create_run(sweep.request.model, f"sweep {sweep.id}", {"stockpot.kind": "sweep", "stockpot.sweep": sweep.id})
        tags = {"stockpot.init": sweep.init.digest, "stockpot.trials": str(len(sweep.trials)), **_flow(flow_run_id)}
        mlflow_run_id = str(run.info.run_id)
        client().log_batch(mlflow_run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        # Written every time: an earlier parent may have died before this line, and the request may bring another gate or quorum.
        client().log_text(mlflow_run_id, sweep.model_dump_json(indent=1), "sweep.json")
        client().log_inputs(mlflow_run_id, _inputs(sweep))
        if run.info.status != "RUNNING":
            client().update_run(mlflow_run_id, "RUNNING")
    return mlflow_run_id


def read_sweep(sweep_id: str) -> Sweep:
    """The sweep as it was planned. Raises `SweepMissing`."""
    with asking():
        return Sweep.model_validate_json(read_file(str(sweep_run(sweep_id).info.run_id), "sweep.json"))


def close_sweep(sweep_id: str, status: Status, counts: dict[str, int]) -> None:
    """End the sweep's run with the number of trials in every state, such as `{"finished": 7, "failed": 1}`."""
    with asking():
        mlflow_run_id = str(sweep_run(sweep_id).info.run_id)
        now = _now_ms()
        client().log_batch(mlflow_run_id, metrics=[Metric(f"sweep/{name}", value, now, 0) for name, value in counts.items()])
        client().set_terminated(mlflow_run_id, status)


def list_sweeps(model: str | None = None) -> list[SweepSummary]:
    """Every sweep in the ledger, or of one model, newest first."""
    with asking():
        models = {one.experiment_id: str(one.name) for one in client().search_experiments() if model in (None, one.name)}
        runs = search_runs(list(models), "tags.`stockpot.kind` = 'sweep'", "attributes.start_time DESC")
    return [
        SweepSummary(
            sweep_id=run.data.tags["stockpot.sweep"],
            model=models[run.info.experiment_id],
            mlflow_run_id=run.info.run_id,
            status=run.info.status,
            trials=int(run.data.tags.get("stockpot.trials", 0)),
            finished=int(run.data.metrics.get("sweep/finished", 0)),
            started=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
        )
        for run in runs
    ]


def read_endings(sweep_id: str) -> dict[str, tuple[str, str]]:
    """How each trial of a sweep that was started for it stands, by trial id: its run's status and, where it failed, the reason."""
    with asking():
        home = sweep_run(sweep_id).info.experiment_id
        runs = search_runs([home], of_kind("trial", sweep_id), "attributes.start_time")
    return {run.data.tags["stockpot.trial"]: (str(run.info.status), run.data.tags.get("stockpot.reason", "")) for run in runs}


def find_ingredient(model: str, trial_id: str) -> Ingredient | None:
    """The ingredient a trial left, whichever sweep it ran for; None when it has not finished."""
    with asking():
        return next(iter(_ingredients(model, f"tags.`stockpot.trial` = '{trial_id}'")), None)


def find_ingredients(sweep: Sweep) -> list[Ingredient]:
    """The ingredients of a sweep's finished trials, moving averages after each, in the sweep's order, each with its place in this sweep."""
    with asking():
        known = {one.trial_id: one for one in reversed(_ingredients(sweep.request.model, f"tags.`stockpot.init` = '{sweep.init.digest}'"))}
    finished = [trial for trial in sweep.trials if trial.id in known]  # a trial's own ingredient is recorded last
    return [known[name].model_copy(update={"index": trial.index}) for trial in finished for name in trial.ingredient_ids if name in known]


def find_earlier(sweep: Sweep, most: int) -> list[tuple[Ingredient, str]]:
    """Ingredients of other sweeps of the same model from the same init, the best on their own held_out first, each with its sweep's id."""
    if not most:
        return []
    own = {name for trial in sweep.trials for name in trial.ingredient_ids}
    with asking():
        models = search_models(sweep.request.model, f"tags.`stockpot.init` = '{sweep.init.digest}'")
    found = {
        one.trial_id: (one, tags["stockpot.sweep"])
        for tags in (model.tags for model in models)
        if "stockpot.ingredient" in tags and (one := Ingredient.model_validate_json(tags["stockpot.ingredient"])).trial_id not in own
    }
    return sorted(found.values(), key=lambda pair: (-pair[0].held_out.value, pair[0].trial_id))[:most]


def fetch_ingredient(ingredient: Ingredient, folder: Path) -> Path:
    """Download an ingredient's files (`INGREDIENT_FILES`) into `folder`. Raises `IngredientMismatch` when they are others."""
    folder.mkdir(parents=True, exist_ok=True)
    with asking():
        for name in INGREDIENT_FILES:
            if name not in _stored_files(ingredient):
                raise _mismatch(ingredient, f"{name} is missing")
        download_artifacts(artifact_uri=f"models:/{ingredient.model_id}", dst_path=str(folder), tracking_uri=address())
    if (found := file_digest(folder / INGREDIENT_FILES[0])) != ingredient.weights_sha256:
        raise _mismatch(ingredient, f"its weights have sha256 {found[:12]}, recorded were {ingredient.weights_sha256[:12]}")
    for name, sha256 in ingredient.files.items():
        if file_digest(folder / name) != sha256:
            raise _mismatch(ingredient, f"{name} has another sha256 than the recorded {sha256[:12]}")
    return folder


def record_report(report: SoupReport, files: Path) -> SoupReport:
    """Store a cooked sweep on its soup run: every file of `files`, then `report.json`, then the end of the run. The last is the commit: a
    report without it is not found again. Returns the report."""
    with asking():
        client().log_artifacts(report.mlflow_run_id, str(files))
        client().log_batch(report.mlflow_run_id, metrics=_report_metrics(report), tags=_report_tags(report, files))
        client().log_text(report.mlflow_run_id, report.model_dump_json(indent=1), "report.json")
        client().set_terminated(report.mlflow_run_id, "FINISHED")
    return report


def read_report(sweep_id: str) -> SoupReport | None:
    """The report of a cooked sweep; None when it has not been cooked. Raises `SweepMissing` when there is no such sweep."""
    with asking():
        sweep = sweep_run(sweep_id)
        runs = search_runs(
            [sweep.info.experiment_id], f"{of_kind('soup', sweep_id)} and attributes.status = 'FINISHED'", "attributes.start_time"
        )
        return SoupReport.model_validate_json(read_file(str(runs[0].info.run_id), "report.json")) if runs else None


def open_soup_run(model: str, sweep_id: str, flow_run_id: str | None = None) -> str:
    """The run a sweep's soup is recorded on, a child of the sweep's: created or reopened. Returns its id."""
    with asking():
        run = find_run(model, "soup", sweep_id) or create_child(model, f"soup {sweep_id}", "soup", sweep_id, {})
        for name, value in _flow(flow_run_id).items():
            client().set_tag(run.info.run_id, name, value)
        return str(run.info.run_id)


def read_text(mlflow_run_id: str, name: str) -> str:
    """One text file of a run, such as `card.md`."""
    with asking():
        return read_file(mlflow_run_id, name).decode()


def store_text(mlflow_run_id: str, name: str, text: str) -> None:
    """Put one more text file on a run, replacing one of that name."""
    with asking():
        client().log_text(mlflow_run_id, text, name)


def read_picture(report: SoupReport) -> bytes:
    """The soup's picture, PNG."""
    with asking():
        return read_file(report.mlflow_run_id, "picture.png")


def fetch_report_file(mlflow_run_id: str, name: str, folder: Path) -> Path:
    """Download one file of a soup run, such as `gate_logits.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    with asking():
        return Path(client().download_artifacts(mlflow_run_id, name, str(folder)))


def run_page(mlflow_run_id: str, model: str) -> str:
    """The address of a run's page for a browser."""
    with asking():
        return f"{address().rstrip('/')}/#/experiments/{experiment(model)}/runs/{mlflow_run_id}"


class TrialLog:
    """The child run of one trial, open while the `with` block runs: FINISHED after it, FAILED with the reason on an error, KILLED on an
    interruption. A further attempt reopens the run of the first one, and from then on it alone says how the run ends. Metrics never stall
    or stop the trial: see `spool`.

    attempt: counts from 1. Raises `ServerUnreachable` on entering, before anything was computed.
    """

    def __init__(self, trial: Trial, flow_run_id: str | None = None, attempt: int = 1) -> None:
        self.trial = trial
        self._writer = uuid4().hex
        self._tags = {"stockpot.attempt": str(attempt), "stockpot.writer": self._writer, **_flow(flow_run_id)}

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
            client().log_inputs(self.mlflow_run_id, [_input("train", trial.snapshot, "training")])
        self._spool = Spool(_spool_folder() / f"{self.mlflow_run_id}.{self._writer}.jsonl", self._send)
        self._sampler = Sampler(self.metrics)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sampler.close()
        left = self._spool.close()
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
        except ServerUnreachable:
            if error is None:
                raise

    def params(self, values: dict[str, Any]) -> None:
        """Log parameters; those of an earlier attempt stay as they are. Raises `ServerUnreachable`."""
        new = [Param(name, str(value)) for name, value in values.items() if name not in self._known_params]
        with asking():
            for start in range(0, len(new), 100):
                client().log_batch(self.mlflow_run_id, params=new[start : start + 100])
        self._known_params.update(values)

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Keep one value per curve (`train/loss`, `held_out/accuracy`) at an optimiser step: returns at once, whatever the network does."""
        now = _now_ms()
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
        )
        ledger.set_logged_model_tags(model.model_id, {"stockpot.ingredient": ingredient.model_dump_json()})
        return ingredient

    def _send(self, points: list[Point]) -> None:
        _send_points(self.mlflow_run_id, points)


def replay_metrics() -> int:
    """Deliver what ended trials on this node could not, and return how many points that was. Points of a run that this server does not
    know wait for the server that does. Raises `ServerUnreachable`."""
    waiting = [path for path in sorted(_spool_folder().glob("*.jsonl")) if _known(_run_of(path))]
    return sum(replay(path, partial(_send_points, _run_of(path))) for path in waiting)


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
    with asking():
        client().log_batch(mlflow_run_id, metrics=[Metric(*point) for point in points])


def _ingredients(model: str, condition: str) -> list[Ingredient]:
    """Finished ingredients of an experiment, oldest first."""
    tags = [one.tags["stockpot.ingredient"] for one in search_models(model, condition) if "stockpot.ingredient" in one.tags]
    return [Ingredient.model_validate_json(tag) for tag in tags]


def _stored_files(ingredient: Ingredient) -> set[str]:
    try:
        return {info.path for info in client().list_logged_model_artifacts(ingredient.model_id)}
    except RestException as error:
        raise _mismatch(ingredient, f"its LoggedModel {ingredient.model_id} is gone") from error


def _mismatch(ingredient: Ingredient, found: str) -> IngredientMismatch:
    return IngredientMismatch(f"Ingredient {ingredient.trial_id} is not what was recorded: {found}; run its trial again or leave it out.")


def _input(name: str, snapshot: PinnedSnapshot, context: str) -> DatasetInput:
    """A snapshot as MLflow dataset lineage; a digest field there holds 36 characters, so the sha256 is cut."""
    source = json.dumps({"uri": snapshot.uri})
    return DatasetInput(Dataset(name, snapshot.digest[:36], "http", source), tags=[InputTag("mlflow.data.context", context)])


def _inputs(sweep: Sweep) -> list[DatasetInput]:
    # The very input that each trial logs: the server keeps one row per dataset, and trials that start together would race to make it.
    inputs = [_input("train", sweep.data.snapshot, "training")]
    if sweep.data.test:
        inputs.append(_input("test", sweep.data.test, "test"))
    return inputs + [_input(name, snapshot, "shift") for name, snapshot in sweep.data.shifts.items()]


def _report_metrics(report: SoupReport) -> list[Metric]:
    now, metrics = _now_ms(), []
    for name, scores in report.scores.items():
        splits = {"held_out": scores.held_out, "gate": scores.gate, "test": scores.test}
        splits |= {f"shift_{suite}": score for suite, score in scores.shifts.items()}
        metrics += [Metric(f"{split}/{name}", score.value, now, 0) for split, score in splits.items() if score]
    steps = [step.after.value for step in report.steps if step.kept]
    return metrics + [Metric("greedy/held_out", value, now, size + 1) for size, value in enumerate(steps)]


def _report_tags(report: SoupReport, files: Path) -> list[RunTag]:
    tags = {"stockpot.soup_sha256": report.soup_sha256, "stockpot.recipe": report.recipe, "stockpot.best_single": report.best_single}
    if (card := files / "card.md").exists():
        tags["mlflow.note.content"] = card.read_text()[:8000]
    return [RunTag(name, value) for name, value in tags.items()]


def _flow(flow_run_id: str | None) -> dict[str, str]:
    return {"stockpot.prefect_flow_run_id": flow_run_id} if flow_run_id else {}


def _now_ms() -> int:
    return int(time.time() * 1000)
