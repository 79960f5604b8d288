"""What other models' experiments have to lend: ingredients whose bodies a soup of this model may borrow (`stockpot.soup.borrowing`)."""

from typing import NamedTuple

from stockpot.config import Init, SoupSpec, Sweep
from stockpot.ledger import tracking
from stockpot.ledger.connection import asking, search_experiments, search_runs
from stockpot.ledger.records import Unread, readable
from stockpot.outcomes import Ingredient, SweepSummary


class Loan(NamedTuple):
    """An ingredient of another model."""

    ingredient: Ingredient
    sweep: Sweep
    """That it was trained for."""

    def unfit(self, init: Init, transform_digest: str) -> str | None:
        """Why its body is none for a soup from this init, of inputs prepared so; None when it is one."""
        theirs = self.sweep.init.body
        if not theirs:
            return f"The heads of sweep {self.sweep.id} were trained, so its bodies fit no other head; a lender needs `init.freeze_head`."
        if self.ingredient.transform_digest != transform_digest:
            return f"Its inputs are prepared another way ({self.ingredient.transform_digest}, the sweep's is {transform_digest})."
        if theirs != init.body:
            return f"It started from body {theirs[:12]}, the sweep's is {init.body[:12] or 'not known'}: only one body averages."
        return None


def find_loans(soup: SoupSpec, init: Init, unread: Unread) -> dict[str, list[Loan]]:
    """Every model that the recipe borrows of, to the best so many of its ingredients on their own held_out, those with this body first.

    unread: told of each sweep with a record that cannot be read; none of it is lent.
    """
    return {model: offers(model, init.body, unread)[:most] for model, most in sorted(soup.bodies_of.items())}


def find_borrowers(model: str, unread: Unread) -> list[Sweep]:
    """Sweeps of other models that name this one to borrow of. unread: told of each that cannot be read."""
    with asking():
        everywhere = [one.experiment_id for one in search_experiments()]
        condition = f"tags.`stockpot.kind` = 'sweep' and tags.`stockpot.lender.{model}` LIKE '%'"
        runs = search_runs(everywhere, condition, "attributes.start_time")
    return [sweep for _, sweep in readable(runs, lambda run: tracking.sweep_on(run.info.run_id), unread)]


def offers(model: str, body: str, unread: Unread) -> list[Loan]:
    """Every ingredient of a model, the best on their own held_out first, those with this body before them."""
    lent = readable(tracking.list_sweeps(model), _lent_by, unread)
    found = {loan.ingredient.trial_id: loan for _, loans in lent for loan in loans}
    return sorted(
        found.values(), key=lambda loan: (loan.sweep.init.body != body, -loan.ingredient.held_out.value, loan.ingredient.trial_id)
    )


def _lent_by(summary: SweepSummary) -> list[Loan]:
    sweep = tracking.sweep_on(summary.mlflow_run_id)
    return [Loan(one, sweep) for one in tracking.find_ingredients(sweep)]
