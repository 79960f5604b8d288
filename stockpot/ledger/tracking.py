"""The ledger, on MLflow: experiment = model name, parent run = sweep, child run = trial or soup, LoggedModel = ingredient.

A trial id is found within its experiment, so a trial finished for one sweep is finished for every sweep of that model. An ingredient
exists once its LoggedModel is READY and carries the tag `stockpot.ingredient`: that tag is written last. Every run carries `stockpot.kind`
(sweep, trial, soup) and `stockpot.sweep`.
"""

import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from mlflow.artifacts import download_artifacts
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, Metric, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from stockpot.config import PinnedSnapshot, Sweep
from stockpot.digests import file_digest
from stockpot.errors import IngredientMismatch
from stockpot.ledger.connection import (
    address,
    asking,
    check_server,
    client,
    create_child,
    create_run,
    experiment,
    find_run,
    is_gone,
    of_kind,
    read_file,
    search_experiments,
    search_models,
    search_runs,
    sweep_run,
)
from stockpot.ledger.limits import RUN_TAG, shortened
from stockpot.ledger.records import Unread, insist, parsed, readable
from stockpot.ledger.standing import stand_finished
from stockpot.outcomes import Enough, Ingredient, SoupReport, SweepSummary

__all__ = ["check_server", "close_sweep", "fetch_ingredient", "find_ingredient", "find_ingredients", "list_sweeps",
           "open_sweep", "read_report", "read_sweep", "record_report"]  # fmt: skip

INGREDIENT_FILES = ("model.safetensors", "held_out.safetensors", "card.json", "model.json", "fingerprint.json")
Status = Literal["FINISHED", "FAILED", "KILLED"]
RUNNING = " and attributes.status = 'RUNNING'"


def open_sweep(sweep: Sweep, flow_run_id: str | None = None, flow_run_page: str | None = None) -> str:
    """The MLflow run of a sweep: created with `sweep.json`, or reopened. Its description links to the flow run's page. Returns its id."""
    with asking():
        found = find_run(sweep.request.model, "sweep", sweep.id)
        run = found or create_run(sweep.request.model, f"sweep {sweep.id}", {"stockpot.kind": "sweep", "stockpot.sweep": sweep.id})
        tags = {"stockpot.init": sweep.init.digest, "stockpot.trials": str(len(sweep.trials)), **flow_tags(flow_run_id, flow_run_page)}
        tags |= {f"stockpot.lender.{model}": str(most) for model, most in sweep.request.soup.bodies_of.items()}
        enough = _standing(run, sweep)
        tags["mlflow.note.content"] = _note(flow_run_page or "", enough.reason if enough else "")
        mlflow_run_id = str(run.info.run_id)
        client().log_batch(mlflow_run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        # Written every time: an earlier parent may have died before this line, and the request may bring another gate or quorum.
        client().log_text(mlflow_run_id, sweep.model_dump_json(indent=1), "sweep.json")
        client().log_inputs(mlflow_run_id, _inputs(sweep))
        if run.info.status != "RUNNING":
            client().update_run(mlflow_run_id, "RUNNING")
    return mlflow_run_id


def read_sweep(sweep_id: str) -> Sweep:
    """The sweep as it was planned. Raises `SweepMissing`, `RecordUnreadable`."""
    with asking():
        return sweep_on(str(sweep_run(sweep_id).info.run_id))


def sweep_on(mlflow_run_id: str) -> Sweep:
    """The same, where the sweep's run is known."""
    with asking():
        return parsed(Sweep, read_file(mlflow_run_id, "sweep.json"), f"`sweep.json` of MLflow run {mlflow_run_id}")


def close_sweep(sweep_id: str, status: Status, counts: dict[str, int]) -> None:
    """End the sweep's run with the number of trials in every state, such as `{"finished": 7, "failed": 1}`, and the runs of finished trials
    that the ledger did not hear the end of."""
    with asking():
        sweep = sweep_run(sweep_id)
        done = {one.trial_id for one in find_ingredients(sweep_on(str(sweep.info.run_id)))}
        for run in search_runs([sweep.info.experiment_id], of_kind("trial", sweep_id) + RUNNING, "attributes.start_time"):
            if run.data.tags["stockpot.trial"] in done:
                stand_finished(run)
        mlflow_run_id = str(sweep.info.run_id)
        now = now_ms()
        client().log_batch(mlflow_run_id, metrics=[Metric(f"sweep/{name}", value, now, 0) for name, value in counts.items()])
        client().set_terminated(mlflow_run_id, status)


def record_enough(sweep_id: str, enough: Enough) -> None:
    """Keep, as the tag `stockpot.enough` of the sweep's run, why no further trial is started; and tell it on the run's page."""
    with asking():
        run = sweep_run(sweep_id)
        note = _note(run.data.tags.get("stockpot.prefect_flow_run", ""), enough.reason)
        tags = {"stockpot.enough": enough.model_dump_json(), "mlflow.note.content": note}
        client().log_batch(str(run.info.run_id), tags=[RunTag(name, value) for name, value in tags.items()])


def read_enough(sweep: Sweep) -> Enough | None:
    """Why the sweep starts no further trial, if that was decided by the stop rule it has now."""
    with asking():
        return _standing(sweep_run(sweep.id), sweep)


def list_sweeps(model: str | None = None) -> list[SweepSummary]:
    """Every sweep in the ledger, or of one model, newest first."""
    with asking():
        models = {one.experiment_id: str(one.name) for one in search_experiments() if model in (None, one.name)}
        runs = search_runs(list(models), "tags.`stockpot.kind` = 'sweep'", "attributes.start_time DESC")
    return [
        SweepSummary(
            sweep_id=run.data.tags["stockpot.sweep"],
            model=models[run.info.experiment_id],
            mlflow_run_id=run.info.run_id,
            status=run.info.status,
            trials=int(run.data.tags.get("stockpot.trials", 0)),
            finished=int(run.data.metrics.get("sweep/finished", 0)),
            init=run.data.tags.get("stockpot.init", ""),
            started=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
        )
        for run in runs
    ]


def read_endings(sweep_id: str) -> dict[str, tuple[str, str]]:
    """How each trial of a sweep that was started for it stands, by trial id: its run's status and, where it failed, the reason."""
    with asking():
        home = sweep_run(sweep_id).info.experiment_id
        runs = search_runs([home], of_kind("trial", sweep_id), "attributes.start_time DESC")  # the oldest of a trial's has the word
    return {run.data.tags["stockpot.trial"]: (str(run.info.status), run.data.tags.get("stockpot.reason", "")) for run in runs}


def find_ingredient(model: str, trial_id: str) -> Ingredient | None:
    """The ingredient a trial left, whichever sweep it ran for; None when it has not finished."""
    with asking():
        return next(iter(_ingredients(model, f"tags.`stockpot.trial` = '{trial_id}'")), None)


def ingredients_of(model: str, init_digest: str, names: Collection[str]) -> dict[str, Ingredient]:
    """Those of a model's ingredients from one init that are named, by id. One listing, however many; no record of another is read."""
    with asking():
        listed = search_models(model, f"tags.`stockpot.init` = '{init_digest}'")
    found = [one for one in reversed(listed) if "stockpot.ingredient" in one.tags and one.tags["stockpot.trial"] in names]
    return {one.trial_id: one for one in map(_ingredient, found)}


def find_ingredients(sweep: Sweep) -> list[Ingredient]:
    """The ingredients of a sweep's finished trials, moving averages after each, in the sweep's order, each with its place in this sweep."""
    known = ingredients_of(sweep.request.model, sweep.init.digest, {name for trial in sweep.trials for name in trial.ingredient_ids})
    finished = [trial for trial in sweep.trials if trial.id in known]  # a trial's own ingredient is recorded last
    return [known[name].model_copy(update={"index": trial.index}) for trial in finished for name in trial.ingredient_ids if name in known]


def find_earlier(sweep: Sweep, most: int, unread: Unread = insist) -> list[tuple[Ingredient, str]]:
    """Ingredients of other sweeps of the same model from the same init, the best on their own held_out first, each with its sweep's id.

    unread: told of each whose record cannot be read.
    """
    if not most:
        return []
    own = {name for trial in sweep.trials for name in trial.ingredient_ids}
    with asking():
        models = search_models(sweep.request.model, f"tags.`stockpot.init` = '{sweep.init.digest}'")
    others = [one for one in models if "stockpot.ingredient" in one.tags and one.tags["stockpot.trial"] not in own]
    found = {one.trial_id: (one, model.tags["stockpot.sweep"]) for model, one in readable(others, _ingredient, unread)}
    return sorted(found.values(), key=lambda pair: (-pair[0].held_out.value, pair[0].trial_id))[:most]


def fetch_ingredient(ingredient: Ingredient, folder: Path) -> Path:
    """Download an ingredient's files (`INGREDIENT_FILES`) into `folder`. Raises `IngredientMismatch` when they are others."""
    folder.mkdir(parents=True, exist_ok=True)
    with _asking_for(ingredient, INGREDIENT_FILES):
        download_artifacts(artifact_uri=f"models:/{ingredient.model_id}", dst_path=str(folder), tracking_uri=address())
    if missing := [name for name in INGREDIENT_FILES if not (folder / name).exists()]:
        raise _mismatch(ingredient, f"{missing[0]} is missing")
    if (sha256 := file_digest(folder / INGREDIENT_FILES[0])) != ingredient.weights_sha256:
        raise _mismatch(ingredient, f"its weights have sha256 {sha256[:12]}, recorded were {ingredient.weights_sha256[:12]}")
    for name, sha256 in ingredient.files.items():
        if file_digest(folder / name) != sha256:
            raise _mismatch(ingredient, f"{name} has another sha256 than the recorded {sha256[:12]}")
    return folder


def fetch_logits(ingredient: Ingredient, folder: Path) -> Path:
    """Download nothing of an ingredient but its held-out logits (and labels), unless they lie under `folder` already. Raises
    `IngredientMismatch` when they are others, which are removed."""
    name = INGREDIENT_FILES[1]
    path = folder / ingredient.model_id / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as place:  # a download that breaks off leaves a part of the file under its name
            with _asking_for(ingredient, [name]):
                home = client().get_logged_model(ingredient.model_id).artifact_location
                get_artifact_repository(home, tracking_uri=address()).download_artifacts(name, place)
            (Path(place) / name).replace(path)
    if (sha256 := ingredient.files.get(name)) and file_digest(path) != sha256:
        path.unlink()
        raise _mismatch(ingredient, f"{name} has another sha256 than the recorded {sha256[:12]}")
    return path


def record_report(report: SoupReport, files: Path) -> SoupReport:
    """Store a cooked sweep on its soup run: every file of `files`, then `report.json`, then the end of the run. The last is the commit: a
    report without it is not found again. Returns the report."""
    with asking():
        page = client().get_run(report.mlflow_run_id).data.tags.get("stockpot.prefect_flow_run", "")
        client().log_artifacts(report.mlflow_run_id, str(files))
        client().log_batch(report.mlflow_run_id, metrics=_report_metrics(report), tags=_report_tags(report, files, page))
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
        return parsed(SoupReport, read_file(str(runs[0].info.run_id), "report.json"), f"The report of sweep {sweep_id}") if runs else None


def open_soup_run(model: str, sweep_id: str, flow_run_id: str | None = None, flow_run_page: str | None = None) -> str:
    """The run a sweep's soup is recorded on, a child of the sweep's: created or reopened. Of runs that two nodes created at once the oldest
    stays, for both. Returns its id."""
    with asking():
        if not find_run(model, "soup", sweep_id):
            create_child(model, f"soup {sweep_id}", "soup", sweep_id, {})
        run, *others = search_runs([experiment(model)], of_kind("soup", sweep_id), "attributes.start_time")
        for other in others:
            if other.info.status != "FINISHED":
                client().delete_run(other.info.run_id)
        for name, value in flow_tags(flow_run_id, flow_run_page).items():
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


def report_page(report: SoupReport) -> str:
    """The address of a soup's page for a browser, beside which MLflow lists its card and picture."""
    with asking():
        return f"{address().rstrip('/')}/#/experiments/{experiment(report.model)}/runs/{report.mlflow_run_id}/artifacts/report.html"


def _ingredients(model: str, condition: str) -> list[Ingredient]:
    """Finished ingredients of an experiment, oldest first."""
    found = [one for one in search_models(model, condition) if "stockpot.ingredient" in one.tags]
    return [_ingredient(one) for one in found]


def _ingredient(found: LoggedModel) -> Ingredient:
    return parsed(Ingredient, found.tags["stockpot.ingredient"], f"The tag `stockpot.ingredient` of LoggedModel {found.model_id}")


@contextmanager
def _asking_for(ingredient: Ingredient, names: Sequence[str]) -> Iterator[None]:
    """`asking` for files of an ingredient. Raises `IngredientMismatch` when one is not there, or the whole vanishes meanwhile."""
    with asking():
        try:
            found = {info.path for info in client().list_logged_model_artifacts(ingredient.model_id)}
            if missing := [name for name in names if name not in found]:
                raise _mismatch(ingredient, f"{missing[0]} is missing")
            yield
        except MlflowException as error:
            if not is_gone(error):
                raise
            raise _mismatch(ingredient, f"its LoggedModel {ingredient.model_id} is gone") from error


def _mismatch(ingredient: Ingredient, found: str) -> IngredientMismatch:
    return IngredientMismatch(f"Ingredient {ingredient.trial_id} is not what was recorded: {found}; run its trial again or leave it out.")


def dataset(name: str, snapshot: PinnedSnapshot, context: str) -> DatasetInput:
    """A snapshot as MLflow dataset lineage; a digest field there holds 36 characters, so the sha256 is cut."""
    source = json.dumps({"uri": snapshot.uri})
    return DatasetInput(Dataset(name, snapshot.digest[:36], "http", source), tags=[InputTag("mlflow.data.context", context)])


def _inputs(sweep: Sweep) -> list[DatasetInput]:
    # The very input that each trial logs: the server keeps one row per dataset, and trials that start together would race to make it.
    inputs = [dataset("train", sweep.data.snapshot, "training")]
    if sweep.data.test:
        inputs.append(dataset("test", sweep.data.test, "test"))
    return inputs + [dataset(name, snapshot, "shift") for name, snapshot in sweep.data.shifts.items()]


def _report_metrics(report: SoupReport) -> list[Metric]:
    now, metrics = now_ms(), []
    for name, scores in report.scores.items():
        splits = {"held_out": scores.held_out, "gate": scores.gate, "test": scores.test}
        splits |= {f"shift_{suite}": score for suite, score in scores.shifts.items()}
        metrics += [Metric(f"{split}/{name}", score.value, now, 0) for split, score in splits.items() if score]
    steps = [step.after.value for step in report.steps if step.kept]
    return metrics + [Metric("greedy/held_out", value, now, size + 1) for size, value in enumerate(steps)]


def _standing(run: Run, sweep: Sweep) -> Enough | None:
    told = run.data.tags.get("stockpot.enough")
    found = parsed(Enough, told, f"The tag `stockpot.enough` of MLflow run {run.info.run_id}") if told else None
    return found if found and found.rule == sweep.request.fan_out.stop else None


def _note(page: str, text: str) -> str:
    """What stands at the top of a run's page, as markdown."""
    whole = "\n\n".join(part for part in (f"[The flow run in Prefect]({page})" if page else "", text) if part)
    return shortened(whole, RUN_TAG, "The whole card is `card.md` among this run's artifacts.")


def _report_tags(report: SoupReport, files: Path, page: str) -> list[RunTag]:
    tags = {"stockpot.soup_sha256": report.soup_sha256, "stockpot.recipe": report.recipe, "stockpot.best_single": report.best_single}
    if (card := files / "card.md").exists():
        tags["mlflow.note.content"] = _note(page, card.read_text())
    return [RunTag(name, value) for name, value in tags.items()]


def flow_tags(flow_run_id: str | None, page: str | None = None) -> dict[str, str]:
    """What ties an MLflow run to the Prefect run that writes it: its id, and the address of its page."""
    tags = {"stockpot.prefect_flow_run_id": flow_run_id, "stockpot.prefect_flow_run": page}
    return {name: value for name, value in tags.items() if value}


def now_ms() -> int:
    """MLflow's clock: milliseconds since 1970."""
    return int(time.time() * 1000)
