"""Ingredients from outside the sweep, so that this retraining gains from the last one's trials: the best of earlier sweeps, and the current
champion. Each must have started from the same init, and is scored on this sweep's held_out: what it recorded elsewhere is no comparison.

The champion was chosen on a held_out that is often the same samples, so its place in the ranking flatters it. The gate split, which
nothing was ever chosen on, has the last word.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from stockpot.config import Sweep
from stockpot.data.snapshots import open_snapshot
from stockpot.errors import IngredientMismatch, ModelError, RecordUnreadable, RegistryError, SweepMissing
from stockpot.evaluation import accuracy
from stockpot.ledger import registry, tracking
from stockpot.outcomes import Ingredient, ModelVersion
from stockpot.soup.kitchen import Dish, Kitchen
from stockpot.soup.recipes.averaging import average
from stockpot.soup.soupability import Candidate, Pool, open_model, require_alike, require_init


def rescored(pool: Pool, kitchen: Kitchen, sweep: Sweep) -> Pool:
    """The pool with candidates of earlier sweeps scored on this held_out, without those that may have been trained on it."""
    doubts = {}
    for trial, origin in pool.origins.items():
        if trial not in pool.candidates:
            continue
        try:
            _require_other_samples(sweep, origin)
        except IngredientMismatch as doubt:
            doubts[trial] = str(doubt)
        else:
            pool = kitchen.rescored(pool, trial)
    return pool.without(doubts)


def with_champion(pool: Pool, kitchen: Kitchen, sweep: Sweep, folder: Path) -> Pool:
    """The pool with the model's champion in it, or the reason why it is not; as it was where the model has no champion.

    folder: where its files are put.
    """
    number = registry.alias_version(sweep.request.model, "champion")
    if number is None:
        return pool
    version = registry.read_version(sweep.request.model, number)
    name, origin = version.ingredient_id, registry.read_tags(version).get("stockpot.sweep", "")
    try:
        candidate = _examine(version, origin, pool, kitchen, sweep, folder)
    except (IngredientMismatch, ModelError, RegistryError) as error:
        return pool.without({name: f"The champion, version {number}: {error}"})
    return replace(pool, candidates=pool.candidates | {name: candidate}, origins=pool.origins | {name: origin}, champion=version)


def _examine(version: ModelVersion, origin: str, pool: Pool, kitchen: Kitchen, sweep: Sweep, folder: Path) -> Candidate:
    init = registry.read_tags(version).get("stockpot.init")
    if not (init and origin):
        raise IngredientMismatch("It was not made by Stockpot's `soup`, so nobody knows its init.")
    if origin == sweep.id:
        raise IngredientMismatch("It is this sweep's own soup, whose ingredients are in the pool already.")
    require_init(init, sweep.init)
    _require_other_samples(sweep, origin)
    stored = registry.find_soup(version.model, version.soup_sha256)
    # The last question to the ledger: were it to go away later, the open file would keep its room on the disk.
    weights, config = open_model(registry.fetch_soup(version.model, version.soup_sha256, folder), version.soup_sha256)
    require_alike(weights, config, pool.start, pool.config)
    seen = kitchen.splits["held_out"]
    logits_NC = kitchen.logits(Dish((version.soup_sha256,), partial(average, [weights])), "held_out")
    assert stored
    ingredient = Ingredient(
        trial_id=version.ingredient_id,
        index=len(sweep.trials),
        model_id=stored.model_id,
        mlflow_run_id=stored.source_run_id or "",
        weights_sha256=version.soup_sha256,
        init_digest=init,
        transform_digest=seen.transform_digest,
        held_out=accuracy(logits_NC, seen.labels),
        seconds=0.0,
    )
    return Candidate(ingredient, weights, config, logits_NC)


def _require_other_samples(sweep: Sweep, origin: str) -> None:
    """Raises `IngredientMismatch` where what a sweep made may have been trained on this sweep's held_out."""
    try:
        theirs = tracking.read_sweep(origin).data.snapshot
    except SweepMissing as error:
        raise IngredientMismatch(f"It is of sweep {origin}, which is gone, so nobody knows what it was trained on.") from error
    except RecordUnreadable as error:
        raise IngredientMismatch(f"It is of sweep {origin}. {error}") from error
    if theirs == sweep.data.snapshot:
        return
    rule = open_snapshot(sweep.data.snapshot).manifest.rule  # None: the splits were given by name, so any sample may have moved
    if rule is None or rule != open_snapshot(theirs).manifest.rule:
        raise IngredientMismatch(f"It is of sweep {origin}, whose data was split otherwise: it may have been trained on this held_out.")
