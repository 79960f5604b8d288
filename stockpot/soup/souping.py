"""Cook one sweep: gather its ingredients, rank them on held_out, make the greedy and the uniform soup, score them beside the best single
model and every trial, and record what was made, decided and measured. Needs nothing but the sweep's id.

Nothing selects but held_out. If no soup beats the best single model, that model ships, as a soup of one, and the record says so.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from stockpot.checkpoints import save_weights
from stockpot.config import Sweep
from stockpot.digests import canonical
from stockpot.ledger import registry, tracking
from stockpot.outcomes import Accuracy, ClassChange, GreedyStep, Scores, SoupReport, TrialPoint
from stockpot.soup import card, page, picture
from stockpot.soup.comparing import Comparison, compare
from stockpot.soup.kitchen import Kitchen
from stockpot.soup.recipes.examining import Verdict
from stockpot.soup.recipes.greedy import greedy, members, ranked
from stockpot.soup.soupability import Pool, check_accuracy, gather
from stockpot.soup.statistics import right

Say = Callable[[str], None]

# N samples, C classes


def cook(sweep_id: str, *, flow_run_id: str | None = None, say: Say) -> SoupReport:
    """The report of a sweep's soup, recorded in the ledger; the same finished trials again give the recorded one.

    say: called with one line per event. Raises `SweepMissing`, and `TooFewIngredients` when no finished trial is fit.
    """
    tracking.check_server()
    sweep = tracking.read_sweep(sweep_id)
    ingredients = tracking.find_ingredients(sweep)
    done = tracking.read_report(sweep_id)
    # Fewer than were cooked is no news either: `stockpot prune` may have taken what the soup does not need.
    if done and {one.trial_id for one in ingredients} <= {one.trial_id for one in done.trials} | set(done.excluded):
        say(f"sweep {sweep_id} is cooked already: soup {done.soup_sha256[:12]}")
        return done
    began = time.monotonic()
    tracking.open_soup_run(sweep.request.model, sweep_id, flow_run_id)
    with TemporaryDirectory(prefix="stockpot-soup-") as scratch:
        folder = Path(scratch)
        pool = gather(ingredients, sweep.init, folder / "ingredients")
        try:
            kitchen = Kitchen(sweep, pool)
            kitchen.pool = _trusted(pool, kitchen)
            for trial, reason in kitchen.pool.excluded.items():
                say(f"left out {trial}: {reason}")
            return _cook(sweep, kitchen, folder, began, say)
        finally:
            pool.close()


def _trusted(pool: Pool, kitchen: Kitchen) -> Pool:
    """The pool without candidates whose recorded accuracy does not follow from their logits."""
    held_out = kitchen.splits["held_out"]
    doubts = {trial: check_accuracy(one, held_out.labels, held_out.transform_digest) for trial, one in pool.candidates.items()}
    return pool.without({trial: reason for trial, reason in doubts.items() if reason})


def _cook(sweep: Sweep, kitchen: Kitchen, folder: Path, began: float, say: Say) -> SoupReport:
    pool, wanted = kitchen.pool, sweep.request.soup.recipe
    singles = {trial: one.ingredient.held_out for trial, one in pool.candidates.items()}
    best = ranked(singles)[0]
    steps = _greedy(sweep, singles, kitchen, say)
    recipes = {"best_single": (best,), "uniform": tuple(sorted(singles)), "greedy": members(steps)}
    scores = {name: kitchen.scores(kitchen.soup(trials)) for name, trials in recipes.items()}
    for name, trials in recipes.items():
        say(f"{name.replace('_', ' ')} of {len(trials)}: held_out {scores[name].held_out.value:.4f}")
    compared = compare(kitchen, sweep.init, recipes, sweep.request.soup, folder) if sweep.request.soup.compare else Comparison()
    (folder / "soup").mkdir()
    report = SoupReport(
        sweep_id=sweep.id,
        model=sweep.request.model,
        mlflow_run_id="",
        recipe=wanted,
        soup_sha256=save_weights(folder / "soup" / "model.safetensors", kitchen.soup(recipes[wanted]).make()),
        init_digest=sweep.init.digest,
        transform_digest=kitchen.splits["held_out"].transform_digest,
        best_single=best,
        ingredients=recipes[wanted],
        steps=tuple(steps),
        scores=scores | compared.scores,
        alphas=compared.alphas,
        angles=compared.angles,
        trials=_points(kitchen, recipes["greedy"]),
        excluded=pool.excluded,
    )
    gate_logits = {name: kitchen.logits(kitchen.soup(trials), "gate") for name, trials in recipes.items()}
    labels_N = torch.as_tensor(kitchen.splits["gate"].labels)
    report = report.model_copy(update={"classes": _classes(pool.config.classes, labels_N, gate_logits["best_single"], gate_logits[wanted])})
    return _record(report, sweep, pool, gate_logits | {"labels": labels_N}, folder, began)


def _classes(names: Sequence[str], labels_N: Tensor, single_NC: Tensor, soup_NC: Tensor) -> tuple[ClassChange, ...]:
    """Right answers per class, of the best single model and of the soup."""
    counts = [torch.bincount(labels_N[chosen], minlength=len(names)).tolist() for chosen in (
        labels_N >= 0, right(single_NC, labels_N), right(soup_NC, labels_N))]  # fmt: skip
    return tuple(ClassChange(name=name, seen=seen, single=one, soup=two) for name, seen, one, two in zip(names, *counts, strict=True))


def _greedy(sweep: Sweep, singles: dict[str, Accuracy], kitchen: Kitchen, say: Say) -> list[GreedyStep]:
    def score(trials: Sequence[str], need: int) -> Verdict:
        found = kitchen.verdict(trials, need)
        most = "" if found.examined == found.accuracy.seen else f"at most, after {found.examined} samples, "
        kept = "kept" if found.accuracy.correct >= need else "left out"
        say(f"greedy: with {trials[-1]} {found.accuracy.correct} of {found.accuracy.seen} {most}{need} needed: {kept}")
        return found

    return greedy(singles, score, sweep.request.soup.accept)


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
        "init_digest": report.init_digest,
        "ingredients": {trial: pool.candidates[trial].ingredient.weights_sha256 for trial in report.ingredients},
    }
    (soup / "model.json").write_bytes(canonical(pool.config))
    (soup / "recipe.json").write_bytes(canonical(recipe))
    run = tracking.open_soup_run(report.model, report.sweep_id)
    export = sweep.request.release.torch_export
    model_id = registry.log_soup_model(report.model, run, report.soup_sha256, soup, torch_export=export)
    report = report.model_copy(update={"mlflow_run_id": run, "model_id": model_id, "seconds": time.monotonic() - began})
    (files / "recipe.json").write_bytes(canonical(recipe))
    (files / "card.md").write_text(card.write(report))
    (files / "report.html").write_text(page.write(report, sweep))
    (files / "picture.png").write_bytes(picture.draw(report))
    save_weights(files / "gate_logits.safetensors", gate_logits)
    return tracking.record_report(report, files)
