"""Bodies of other models in a soup across datasets (Wortsman et al. 2022, appendix E). Where heads stay frozen, as class names gave them,
fine-tuning moves bodies alone: an ingredient of a model with other classes can be averaged here once it wears this init's head.
"""

from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from stockpot import storage
from stockpot.checkpoints import load_weights
from stockpot.config import Init, SoupSpec, Sweep
from stockpot.data.shards import transform_digest
from stockpot.data.snapshots import open_snapshot, shared_samples
from stockpot.errors import BadRequest, DataError, IngredientMismatch, ModelError, StockpotError
from stockpot.evaluation import accuracy
from stockpot.ledger import tracking
from stockpot.ledger.lending import Loan, find_loans, offers
from stockpot.ledger.records import Unread, insist, listed
from stockpot.models.bodies import under_another_head
from stockpot.models.classifier import ModelConfig
from stockpot.models.folders import read_model, write_model
from stockpot.models.naming import nearest
from stockpot.outcomes import Borrowed, Ingredient, SoupReport
from stockpot.soup.kitchen import Dish, Kitchen
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.weights import Weights
from stockpot.soup.soupability import Candidate, Pool, open_init, open_model


def require_lenders(soup: SoupSpec, init: Init) -> None:
    """Raises `BadRequest` for a model to borrow bodies of that has no finished trial, or none that fits."""
    for model, most in sorted(soup.bodies_of.items()):
        unread: list[StockpotError] = []
        loans = offers(model, init.body, unread.append)[:most]
        if not loans:
            known = sorted({one.model for one in tracking.list_sweeps() if one.finished})
            passed = f" Passed over: {listed(unread)}" if unread else ""
            raise BadRequest(f"`soup.bodies_of` names {model}, and the ledger has no finished trial of it; {nearest(model, known)}{passed}")
        here = transform_digest(ModelConfig.model_validate_json(storage.read_bytes(f"{init.uri}/model.json")).preprocess)
        if all(reasons := [loan.unfit(init, here) for loan in loans]):
            raise BadRequest(f"`soup.bodies_of` names {model}, and none of its ingredients fits. {reasons[0]}")


def with_loans(pool: Pool, kitchen: Kitchen, sweep: Sweep, folder: Path, unread: Unread = insist) -> Pool:
    """The pool with the bodies that the request borrows, each under this init's head, or the reason why it is not.

    folder: where their files are put. unread: told of each sweep of theirs whose records cannot be read.
    """
    loans = [(model, loan) for model, lent in find_loans(sweep.request.soup, sweep.init, unread).items() for loan in lent]
    with ExitStack() as opened:
        for model, loan in loans:
            name = loan.ingredient.trial_id
            if name in pool.candidates:  # the same trial, of the same data from the same init
                continue
            try:
                candidate = _adopted(loan, pool, kitchen, sweep, folder / name)
            except (IngredientMismatch, ModelError, DataError) as error:
                pool = pool.without({name: f"Of model {model}: {error}"})
            else:
                opened.callback(candidate.weights.close)
                pool = _joined(pool, candidate, loan)
        opened.pop_all()
    return pool


def borrow(ingredient: Ingredient, start: Weights, config: ModelConfig, folder: Path) -> str:
    """Put another model's ingredient into `folder` as a model of this config: its body, and all else of the init. Returns the sha256 of
    the weights, the same each time. Raises `IngredientMismatch` and `ModelError` where its files are not fit."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as place:
        theirs = tracking.fetch_ingredient(ingredient, Path(place))
        open_model(theirs, ingredient.weights_sha256)[0].close()
        return write_model(folder, under_another_head(read_model(theirs), config, load_weights(start.path)))


def borrow_again(ingredient: Ingredient, report: SoupReport, folder: Path) -> Path:
    """An ingredient as a soup borrowed it, put into `folder` again. Returns the folder. Raises `IngredientMismatch` when it is another."""
    start, config = open_init(tracking.read_sweep(report.sweep_id).init, folder)
    with closing(start):
        found, wanted = borrow(ingredient, start, config, folder), report.borrowed[ingredient.trial_id].weights_sha256
    if found != wanted:
        raise IngredientMismatch(
            f"Ingredient {ingredient.trial_id} has sha256 {found[:12]} under the init's head, recorded was {wanted[:12]}."
        )
    return folder


def _adopted(loan: Loan, pool: Pool, kitchen: Kitchen, sweep: Sweep, folder: Path) -> Candidate:
    seen = kitchen.splits["held_out"]
    if reason := loan.unfit(sweep.init, seen.transform_digest):
        raise IngredientMismatch(reason)
    _require_unseen(sweep, loan.sweep)
    sha256 = borrow(loan.ingredient, pool.start, pool.config, folder)
    weights, _ = open_model(folder, sha256)
    logits_NC = kitchen.logits(Dish((sha256,), partial(average, [weights])), "held_out")
    score = {"weights_sha256": sha256, "init_digest": sweep.init.digest, "held_out": accuracy(logits_NC, seen.labels)}
    return Candidate(loan.ingredient.model_copy(update=score), weights, pool.config, logits_NC)


def _joined(pool: Pool, candidate: Candidate, loan: Loan) -> Pool:
    name = candidate.ingredient.trial_id
    borrowed = Borrowed(model=loan.sweep.request.model, weights_sha256=candidate.ingredient.weights_sha256)
    return replace(
        pool,
        candidates=pool.candidates | {name: candidate},
        origins=pool.origins | {name: loan.sweep.id},
        borrowed=pool.borrowed | {name: borrowed},
    )


def _require_unseen(sweep: Sweep, theirs: Sweep) -> None:
    """Raises `IngredientMismatch` where another model's sweep was trained, or ranked, on what samples of this held_out or gate show."""
    if theirs.data.snapshot == sweep.data.snapshot:
        return
    ours = open_snapshot(sweep.data.snapshot)
    if shared := shared_samples(ours, ("held_out", "gate"), open_snapshot(theirs.data.snapshot), ("train", "held_out")):
        raise IngredientMismatch(
            f"It is of sweep {theirs.id}, which was trained or ranked on {shared:,} samples of this held_out and gate."
        )
