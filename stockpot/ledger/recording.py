"""An ingredient on its way into the ledger: stored first, and there once it is published. Between the two whoever trained it decides that
it counts (`stockpot.training.journal`), so that of two attempts of one trial one has the last word.
"""

from pathlib import Path
from typing import NamedTuple

from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import RestException

from stockpot.config import Trial
from stockpot.digests import file_digest
from stockpot.errors import IngredientMismatch
from stockpot.ledger.connection import asking, client, experiment, is_gone
from stockpot.ledger.stored import COMMITTED_BY, delete_stored
from stockpot.ledger.tracking import INGREDIENT_FILES
from stockpot.outcomes import Accuracy, Ingredient


class Made(NamedTuple):
    """What a trial hands over."""

    folder: Path
    """Of the `INGREDIENT_FILES`."""
    weights_sha256: str
    """Of the first of them, as it was written."""
    held_out: Accuracy
    transform_digest: str
    seconds: float
    """Of the whole trial."""
    step: int = 0
    """Optimiser steps behind it."""
    ema_decay: float = 0.0
    """Of the moving average it is."""


def store(trial: Trial, mlflow_run_id: str, made: Made) -> Ingredient:
    """Store what a trial made as a LoggedModel, which nobody takes for an ingredient before it is published. Raises `IngredientMismatch`
    when a file is missing, `ServerUnreachable`."""
    for name in INGREDIENT_FILES:
        if not (made.folder / name).exists():
            raise IngredientMismatch(f"Trial {trial.id} hands over no {name}; an ingredient is {', '.join(INGREDIENT_FILES)}.")
    own = trial.ingredient_id(made.ema_decay)
    tags = {"stockpot.trial": own, "stockpot.sweep": trial.sweep_id, "stockpot.init": trial.init.digest, "stockpot.step": str(made.step)}
    title = f"trial-{trial.index:03d}-{own}".replace(".", "_")  # a LoggedModel's name takes no dot
    with asking():
        ledger = client()
        model = ledger.create_logged_model(experiment(trial.model), title, mlflow_run_id, tags=tags, model_type="stockpot.ingredient")
        ledger.log_model_artifacts(model.model_id, str(made.folder))
        ledger.finalize_logged_model(model.model_id, "READY")
    return Ingredient(
        trial_id=own,
        index=trial.index,
        ema_decay=made.ema_decay,
        model_id=model.model_id,
        mlflow_run_id=mlflow_run_id,
        weights_sha256=made.weights_sha256,
        files={name: file_digest(made.folder / name) for name in INGREDIENT_FILES[1:]},
        init_digest=trial.init.digest,
        transform_digest=made.transform_digest,
        held_out=made.held_out,
        settings=trial.settings,
        seconds=made.seconds,
        gpus=trial.gpus,
    )


def publish(trial: Trial, ingredient: Ingredient) -> None:
    """Make a stored ingredient the trial's; the tag written last does. Whoever publishes it, and however often, what is then there is the
    same. Raises `ServerUnreachable`."""
    with asking():
        ledger, run_id, decay = client(), ingredient.mlflow_run_id, ingredient.ema_decay
        model = ledger.get_logged_model(ingredient.model_id)
        step = int(model.tags["stockpot.step"])
        _give_out(ingredient, step)
        ledger.log_metric(
            run_id,
            f"held_out/accuracy-ema-{decay!r}" if decay else "held_out/accuracy",
            ingredient.held_out.value,
            timestamp=model.creation_timestamp,  # not the clock's: the same point again is no second one
            step=step,
            model_id=ingredient.model_id,
            dataset_name="held_out",
            dataset_digest=trial.snapshot.digest[:36],
        )
        ledger.set_logged_model_tags(ingredient.model_id, {COMMITTED_BY["ingredient"]: ingredient.model_dump_json()})


def _give_out(ingredient: Ingredient, step: int) -> None:
    """Make it an output of its run. MLflow (3.17.2) refuses an output that is there already."""

    def given() -> bool:
        outputs = client().get_run(ingredient.mlflow_run_id).outputs
        return ingredient.model_id in {one.model_id for one in (outputs.model_outputs if outputs else ())}

    if given():
        return
    try:
        client().log_outputs(ingredient.mlflow_run_id, [LoggedModelOutput(ingredient.model_id, step)])
    except RestException:
        if not given():
            raise


def is_stored(ingredient: Ingredient) -> bool:
    """Whether this ledger has the ingredient's files, published or not. Raises `ServerUnreachable`."""
    found = _found(ingredient)
    return found is not None and bool(found.status == LoggedModelStatus.READY)


def discard(ingredient: Ingredient) -> None:
    """Take back what was stored, and counts no more or never did. What is published stays: it did count, and the trial has ended with it.
    Raises `ServerUnreachable`."""
    found = _found(ingredient)
    if found is not None and COMMITTED_BY["ingredient"] not in found.tags:
        delete_stored(ingredient.model_id, "ingredient")


def _found(ingredient: Ingredient) -> LoggedModel | None:
    try:
        with asking():
            return client().get_logged_model(ingredient.model_id)
    except RestException as error:
        if is_gone(error):
            return None
        raise
