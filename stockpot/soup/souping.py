"""Cook one sweep: gather its ingredients, rank them on held_out, make the greedy and the uniform soup, score them beside the best single
model and every trial, and record what was made, decided and measured. Needs nothing but the sweep's id.

Nothing selects but held_out. If no soup beats the best single model, that model ships, as a soup of one, and the record says so.
"""

import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from stockpot.checkpoints import save_weights
from stockpot.config import Sweep
from stockpot.data.node_cache import cache_root, locked
from stockpot.digests import canonical
from stockpot.errors import StockpotError
from stockpot.evaluation import right
from stockpot.ledger import registry, tracking
from stockpot.ledger.records import listed
from stockpot.outcomes import Accuracy, ClassChange, GreedyStep, Ingredient, MarginalPoint, Scores, SoupReport, TrialPoint
from stockpot.soup import card, joining, marginal, page, picture, table
from stockpot.soup.basins import strangers
from stockpot.soup.borrowing import with_loans
from stockpot.soup.comparing import Comparison, Recipes, compare
from stockpot.soup.dishes import shipped
from stockpot.soup.kitchen import Dish, Kitchen
from stockpot.soup.recipes.examining import Verdict
from stockpot.soup.recipes.greedy import greedy, members, ranked, shuffled
from stockpot.soup.recipes.speculation import Speculation
from stockpot.soup.score_cache import ARITHMETIC
from stockpot.soup.soupability import Pool, check_accuracy, gather
from stockpot.soup.tasting import Taste, taste

Say = Callable[[str], None]

# N samples, C classes


def cook(sweep_id: str, *, flow_run_id: str | None = None, flow_run_page: str | None = None, say: Say) -> SoupReport:
    """The report of a sweep's soup, recorded in the ledger; the same finished trials again give the recorded one.

    say: called with one line per event. Raises `SweepMissing`, and `TooFewIngredients` when fewer finished trials are fit than the
    request's `minimum`.
    """
    tracking.check_server()
    sweep = tracking.read_sweep(sweep_id)
    with locked(cache_root() / "locks" / f"soup-{sweep_id}.lock"):  # whoever cooks it on this node is waited for, and has cooked it then
        ingredients = tracking.find_ingredients(sweep)
        done = tracking.read_report(sweep_id)
        # Fewer than were cooked is no news either: `stockpot prune` may have taken what the soup does not need.
        if done and {one.trial_id for one in ingredients} <= {one.trial_id for one in done.trials} | set(done.excluded):
            say(f"sweep {sweep_id} is cooked already: soup {done.soup_sha256[:12]}")
            return done
        tracking.open_soup_run(sweep.request.model, sweep_id, flow_run_id, flow_run_page)
        with TemporaryDirectory(prefix="stockpot-soup-") as scratch:
            return _gathered(sweep, ingredients, Path(scratch), say)


def _gathered(sweep: Sweep, ingredients: list[Ingredient], folder: Path, say: Say) -> SoupReport:
    """Everything that may join is fetched and examined, then cooked."""
    began = time.monotonic()
    unread: list[StockpotError] = []
    earlier = tracking.find_earlier(sweep, sweep.request.soup.earlier, unread.append)
    origins = {one.trial_id: origin for one, origin in earlier}
    everything, minimum = [*ingredients, *[one for one, _ in earlier]], sweep.request.soup.minimum
    pool = gather(everything, sweep.init, folder / "ingredients", origins=origins, minimum=minimum)
    try:
        kitchen = Kitchen(sweep, pool)
        kitchen.pool = pool = joining.rescored(pool, kitchen, sweep)
        if sweep.request.soup.champion:
            kitchen.pool = pool = joining.with_champion(pool, kitchen, sweep, folder / "champion")
        kitchen.pool = pool = with_loans(pool, kitchen, sweep, folder / "loans", unread.append)
        kitchen.pool = pool = _trusted(pool, kitchen)
        for trial in pool.candidates if kitchen.settling else ():
            kitchen.pool = pool = kitchen.rescored(pool, trial)
        kitchen.pool = pool = pool.measured(kitchen.metric, kitchen.splits["held_out"].labels)
        if (barrier := sweep.request.soup.barrier) is not None:
            kitchen.pool = pool = pool.without(strangers(kitchen, barrier))
        if unread:
            say(f"left out of what may join: {listed(unread)}")
        for trial, reason in kitchen.pool.excluded.items():
            say(f"left out {trial}: {reason}")
        return _cook(sweep, kitchen, folder, began, say)
    finally:
        pool.close()


def _trusted(pool: Pool, kitchen: Kitchen) -> Pool:
    """The pool without candidates whose recorded accuracy does not follow from their logits."""
    held_out = kitchen.splits["held_out"]
    doubts = {
        trial: check_accuracy(one, held_out.labels, held_out.transform_digest) or kitchen.check_reload(trial)
        for trial, one in pool.candidates.items()
    }
    return pool.without({trial: reason for trial, reason in doubts.items() if reason})


def _cook(sweep: Sweep, kitchen: Kitchen, folder: Path, began: float, say: Say) -> SoupReport:
    pool, wanted = kitchen.pool, sweep.request.soup.recipe
    singles = pool.held_out
    best = ranked(singles)[0]
    steps: list[GreedyStep] = []

    def greedy_soup() -> Dish:
        steps.extend(_greedy(sweep, singles, kitchen, say))
        return kitchen.soup(members(steps))

    makes = {"best_single": lambda: kitchen.soup([best]), "uniform": lambda: kitchen.soup(sorted(singles)), "greedy": greedy_soup}
    recipes, tastes, gate_logits = dict[str, Sequence[str]](), dict[str, Taste](), dict[str, Tensor]()
    for name, make in makes.items():
        dish, tastes[name] = taste(kitchen, name, make)
        recipes[name], gate_logits[name] = dish.trials, kitchen.logits(dish, "gate")
        say(f"{name.replace('_', ' ')} of {len(dish.trials)}: held_out {tastes[name].scores.held_out.value:.4f}")
    if wanted in recipes:
        dish = kitchen.soup(recipes[wanted])
    else:
        dish, tastes[wanted] = taste(kitchen, wanted, lambda: shipped(kitchen, sweep.init, sweep.request.soup, recipes["greedy"]))
        gate_logits[wanted] = kitchen.logits(dish, "gate")
    compared = compare(kitchen, sweep.init, recipes, sweep.request.soup) if sweep.request.soup.compare else Comparison()
    tastes |= compared.tastes
    gate_labels = torch.as_tensor(kitchen.splits["gate"].labels)
    report = SoupReport(
        sweep_id=sweep.id,
        model=sweep.request.model,
        mlflow_run_id="",
        recipe=wanted,
        metric=kitchen.metric,
        soup_sha256=kitchen.store(dish, folder / "soup"),
        data=sweep.data,
        init_digest=sweep.init.digest,
        transform_digest=kitchen.splits["held_out"].transform_digest,
        best_single=best,
        ingredients=dish.trials,
        shares=dish.shares,
        alpha=sweep.request.soup.alpha if wanted == "wise_ft" else None,
        batch_norm_samples=sum(map(len, kitchen.settling)) or None,
        steps=tuple(steps),
        scores={name: one.scores for name, one in tastes.items()},
        unfitted=_unfitted(kitchen, recipes, tastes, sweep.request.soup.mixing.share),
        calibration={name: one.calibration for name, one in tastes.items()},
        costs=kitchen.costs,
        classes=_classes(pool.config.classes, gate_labels, gate_logits["best_single"], gate_logits[wanted]),
        alphas=compared.alphas,
        angles=compared.angles,
        midpoints=compared.midpoints,
        duplicates=pool.duplicates,
        trials=_points(kitchen, recipes["greedy"]),
        excluded=pool.excluded,
        origins=pool.origins,
        borrowed=pool.borrowed,
        champion=pool.champion,
        marginal=_marginal(sweep, kitchen) if "marginal" in sweep.request.soup.compare else (),
        versions=versions(),
        dtype=", ".join(sorted({slot.kind.split()[0] for slot in pool.candidates[best].weights.slots.values()})),
    )
    return _record(report, sweep, pool, gate_logits | {"labels": gate_labels}, folder, began)


def _unfitted(kitchen: Kitchen, recipes: Recipes, tastes: dict[str, Taste], share: float) -> dict[str, Accuracy]:
    """Held_out as learned mixing is scored on it, of what was learned and of what it is compared with."""
    learned = {name: tastes[name].scores.held_out for name in ("learned", "learned_by_layer") if name in tastes}
    return {name: kitchen.unfitted(kitchen.soup(trials), share) for name, trials in recipes.items()} | learned if learned else {}


def _marginal(sweep: Sweep, kitchen: Kitchen) -> tuple[MarginalPoint, ...]:
    """The greedy soup of the first 1, 2, 4, ... trials of this sweep; what the whole sweep's soup scored already is not scored again."""
    own = [one.ingredient for trial, one in kitchen.pool.candidates.items() if trial not in kitchen.pool.origins]
    places = sorted({one.index for one in own})  # a trial may have several ingredients
    soups = []
    for count in marginal.sizes(len(places)):
        singles = {one.trial_id: one.held_out for one in own if one.index in places[:count]}
        steps = _greedy(sweep, singles, kitchen, lambda _line: None)
        soups.append((count, [step.after for step in steps if step.kept][-1]))
    return marginal.curve(soups, [max(one.seconds * one.gpus for one in own if one.index == place) for place in places])


def versions() -> dict[str, str]:
    """What decides a soup's bits and its decisions, beside its ingredients."""
    packages = {name: installed(name) for name in ("stockpot", "torch", "torchvision", "numpy", "open_clip_torch")}
    return {"python": platform.python_version(), **packages, "averaging": ARITHMETIC}


def _classes(names: Sequence[str], labels_N: Tensor, single_NC: Tensor, soup_NC: Tensor) -> tuple[ClassChange, ...]:
    """Right answers per class, of the best single model and of the soup."""
    counts = [torch.bincount(labels_N[chosen], minlength=len(names)).tolist() for chosen in (
        labels_N >= 0, right(single_NC, labels_N), right(soup_NC, labels_N))]  # fmt: skip
    return tuple(ClassChange(name=name, seen=seen, single=one, soup=two) for name, seen, one, two in zip(names, *counts, strict=True))


def _greedy(sweep: Sweep, singles: dict[str, Accuracy], kitchen: Kitchen, say: Say) -> list[GreedyStep]:
    spec = sweep.request.soup
    order = None if spec.visit_seed is None else shuffled(singles, spec.visit_seed)
    rank = kitchen.by_averaged_logits if spec.order == "averaged_logits" else None
    with Speculation([partial(kitchen.verdict, stove=stove) for stove in kitchen.stoves]) as crowd:

        def score(trials: Sequence[str], need: int) -> Verdict:
            found = crowd.score(trials, need)
            most = "" if found.examined == found.accuracy.seen else f"at most, after {found.examined} samples, "
            needed = f"{need} needed: {'kept' if found.accuracy.correct >= need else 'left out'}" if need else "looked at in full"
            say(f"greedy: with {trials[-1]} {found.accuracy.told} {most}{needed}")
            return found

        steps = greedy(
            singles, score, spec.accept, passes=spec.passes, replacement=spec.replacement, order=order, rank=rank, budget=spec.budget,
            ahead=crowd.ahead,
        )  # fmt: skip
    kitchen.speculated += sum(found.passes for found in crowd.wasted)
    return steps


def _points(kitchen: Kitchen, kept: Sequence[str]) -> tuple[TrialPoint, ...]:
    """Every trial of the picture: its recorded held-out accuracy and the suites."""
    return tuple(
        TrialPoint(
            trial_id=trial,
            index=candidate.ingredient.index,
            scores=Scores(held_out=candidate.ingredient.held_out, shifts=kitchen.shifts(kitchen.soup([trial]))),
            kept=trial in kept,
        )
        for trial, candidate in kitchen.pool.candidates.items()
    )


def _record(report: SoupReport, sweep: Sweep, pool: Pool, gate_logits: dict[str, Tensor], folder: Path, began: float) -> SoupReport:
    """Write the soup's files, store them, and commit the report last."""
    soup, files = folder / "soup", folder / "files"
    files.mkdir()
    recipe = {
        "recipe": report.recipe,
        "soup_sha256": report.soup_sha256,
        "snapshot_digest": sweep.data.snapshot.digest,
        "init_digest": report.init_digest,
        "transform_digest": report.transform_digest,
        "ingredients": {trial: pool.candidates[trial].ingredient.weights_sha256 for trial in report.ingredients},
        "order": report.ingredients,
        "versions": report.versions,
        "dtype": report.dtype,
        "shares": report.shares,
        "alpha": report.alpha,
        "batch_norm_samples": report.batch_norm_samples,
    }
    (soup / "recipe.json").write_bytes(canonical(recipe))
    run = tracking.open_soup_run(report.model, report.sweep_id)
    export = sweep.request.release.torch_export
    model_id = registry.log_soup_model(report.model, run, report.soup_sha256, soup, torch_export=export)
    report = report.model_copy(update={"mlflow_run_id": run, "model_id": model_id, "seconds": time.monotonic() - began})
    (files / "recipe.json").write_bytes(canonical(recipe))
    (files / "card.md").write_text(card.write(report))
    (files / "comparison.csv").write_text(table.as_csv(report))
    (files / "report.html").write_text(page.write(report, sweep))
    (files / "picture.png").write_bytes(picture.draw(report))
    save_weights(files / "gate_logits.safetensors", gate_logits)
    return tracking.record_report(report, files)
