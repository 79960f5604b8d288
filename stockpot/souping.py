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

from stockpot import card, picture, registry, tracking
from stockpot.checkpoints import save_weights
from stockpot.config import Sweep
from stockpot.digests import canonical
from stockpot.evaluation import accuracy, logits
from stockpot.models import ModelConfig, build, load_state
from stockpot.outcomes import Accuracy, GreedyStep, Scores, SoupReport, TrialPoint
from stockpot.shards import Pixels, pixels
from stockpot.snapshots import open_snapshot
from stockpot.soupability import Candidate, Pool, check_accuracy, gather
from stockpot.soups.averaging import average
from stockpot.soups.greedy import greedy, members, ranked

Say = Callable[[str], None]

# N samples, C classes


def cook(sweep_id: str, *, flow_run_id: str | None = None, say: Say) -> SoupReport:
    """The report of a sweep's soup, recorded in the ledger; the same sweep again gives the recorded one.

    say: called with one line per event. Raises `SweepMissing`, and `TooFewIngredients` when no finished trial is fit.
    """
    tracking.check_server()
    if done := tracking.read_report(sweep_id):
        say(f"sweep {sweep_id} is cooked already: soup {done.soup_sha256[:12]}")
        return done
    began = time.monotonic()
    sweep = tracking.read_sweep(sweep_id)
    tracking.open_soup_run(sweep.request.model, sweep_id, flow_run_id)
    with TemporaryDirectory(prefix="stockpot-soup-") as scratch:
        folder = Path(scratch)
        pool = gather(tracking.find_ingredients(sweep), sweep.init, folder / "ingredients")
        kitchen = Kitchen(sweep, pool.config)
        pool = _trusted(pool, kitchen)
        for trial, reason in pool.excluded.items():
            say(f"left out {trial}: {reason}")
        try:
            return _cook(sweep, pool, kitchen, folder, began, say)
        finally:
            for candidate in pool.candidates.values():
                candidate.weights.close()


class Kitchen:
    """One model to put weights into, and the pixels of every split the sweep names."""

    def __init__(self, sweep: Sweep, config: ModelConfig) -> None:
        snapshot = open_snapshot(sweep.data.snapshot)
        snapshot.require_classes(config.classes)
        self.config = config
        self.splits: dict[str, Pixels] = {split: pixels(snapshot, split, config.preprocess) for split in ("held_out", "gate")}
        if sweep.data.test:
            self.splits["test"] = pixels(open_snapshot(sweep.data.test), "test", config.preprocess)
        self.shifts = {name: pixels(open_snapshot(pinned), "test", config.preprocess) for name, pinned in sweep.data.shifts.items()}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = build(config)

    def load(self, state: dict[str, Tensor]) -> None:
        """Put weights into the model; what follows is about them."""
        load_state(self._model, state)

    def logits(self, seen: Pixels) -> Tensor:
        """Float32 (N, C) of the loaded weights."""
        return logits(self._model, seen.images, self.config.preprocess, device=self.device)

    def accuracy(self, seen: Pixels) -> Accuracy:
        """Of the loaded weights."""
        return accuracy(self.logits(seen), seen.labels)

    def shift_scores(self) -> dict[str, Accuracy]:
        """Of the loaded weights, on every suite."""
        return {name: self.accuracy(seen) for name, seen in self.shifts.items()}


def _trusted(pool: Pool, kitchen: Kitchen) -> Pool:
    """The pool without candidates whose recorded accuracy does not follow from their logits."""
    held_out = kitchen.splits["held_out"]
    doubts = {trial: check_accuracy(one, held_out.labels, held_out.transform_digest) for trial, one in pool.candidates.items()}
    return pool.without({trial: reason for trial, reason in doubts.items() if reason})


def _cook(sweep: Sweep, pool: Pool, kitchen: Kitchen, folder: Path, began: float, say: Say) -> SoupReport:
    steps = _greedy(sweep, pool, kitchen, say)
    singles = {trial: one.ingredient.held_out for trial, one in pool.candidates.items()}
    best = ranked(singles)[0]
    recipes = {"best_single": (best,), "uniform": tuple(sorted(singles)), "greedy": members(steps)}
    shipped = folder / "soup"
    shipped.mkdir()
    scores: dict[str, Scores] = {}
    gate_logits: dict[str, Tensor] = {"labels": torch.as_tensor(kitchen.splits["gate"].labels)}
    sha256 = ""
    for name, trials in recipes.items():
        state = _average(pool, trials)
        kitchen.load(state)
        gate_logits[name] = kitchen.logits(kitchen.splits["gate"])
        scores[name] = _score(kitchen, gate_logits[name])
        say(f"{name.replace('_', ' ')} of {len(trials)}: held_out {scores[name].held_out.value:.4f}")
        if name == sweep.request.soup.recipe:
            sha256 = save_weights(shipped / "model.safetensors", state)
    report = SoupReport(
        sweep_id=sweep.id,
        model=sweep.request.model,
        mlflow_run_id="",
        recipe=sweep.request.soup.recipe,
        soup_sha256=sha256,
        init_digest=sweep.init.digest,
        transform_digest=kitchen.splits["held_out"].transform_digest,
        best_single=best,
        ingredients=recipes[sweep.request.soup.recipe],
        steps=tuple(steps),
        scores=scores,
        trials=_points(pool, kitchen, recipes["greedy"]),
        excluded=pool.excluded,
    )
    return _record(report, pool, gate_logits, folder, began)


def _greedy(sweep: Sweep, pool: Pool, kitchen: Kitchen, say: Say) -> list[GreedyStep]:
    def score(trials: Sequence[str], need: int) -> Accuracy:
        kitchen.load(_average(pool, trials))
        found = kitchen.accuracy(kitchen.splits["held_out"])
        say(f"greedy: with {trials[-1]} {found.correct} of {found.seen}, {need} needed: {'kept' if found.correct >= need else 'left out'}")
        return found

    held_out = {trial: one.ingredient.held_out for trial, one in pool.candidates.items()}
    return greedy(held_out, score, sweep.request.soup.accept)


def _average(pool: Pool, trials: Sequence[str]) -> dict[str, Tensor]:
    return average([pool.candidates[trial].weights for trial in sorted(trials)])


def _score(kitchen: Kitchen, gate_NC: Tensor) -> Scores:
    splits = kitchen.splits
    return Scores(
        held_out=kitchen.accuracy(splits["held_out"]),
        gate=accuracy(gate_NC, splits["gate"].labels),
        test=kitchen.accuracy(splits["test"]) if "test" in splits else None,
        shifts=kitchen.shift_scores(),
    )


def _points(pool: Pool, kitchen: Kitchen, kept: Sequence[str]) -> tuple[TrialPoint, ...]:
    """Every trial of the picture: its recorded held-out accuracy and the suites."""

    def point(trial: str, candidate: Candidate) -> TrialPoint:
        if kitchen.shifts:
            kitchen.load(_average(pool, [trial]))
        scores = Scores(held_out=candidate.ingredient.held_out, shifts=kitchen.shift_scores())
        return TrialPoint(trial_id=trial, index=candidate.ingredient.index, scores=scores, kept=trial in kept)

    return tuple(point(trial, candidate) for trial, candidate in pool.candidates.items())


def _record(report: SoupReport, pool: Pool, gate_logits: dict[str, Tensor], folder: Path, began: float) -> SoupReport:
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
    model_id = registry.log_soup_model(report.model, run, report.soup_sha256, soup)
    report = report.model_copy(update={"mlflow_run_id": run, "model_id": model_id, "seconds": time.monotonic() - began})
    (files / "recipe.json").write_bytes(canonical(recipe))
    (files / "card.md").write_text(card.write(report))
    (files / "picture.png").write_bytes(picture.draw(report))
    save_weights(files / "gate_logits.safetensors", gate_logits)
    return tracking.record_report(report, files)
