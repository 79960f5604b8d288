"""Whether the candidates lie in one basin: half way between two models that fine-tuning kept together, accuracy holds or gains; between
models of two basins it falls to chance (linear mode connectivity: Frankle et al. 2020, arXiv:1912.05671; Neyshabur et al. 2020,
arXiv:2008.11687). Asked of each candidate and the best single one, at one evaluation each.
"""

from stockpot.outcomes import Accuracy
from stockpot.soup.kitchen import Kitchen
from stockpot.soup.recipes.greedy import ranked


def midpoints(kitchen: Kitchen) -> dict[str, Accuracy]:
    """Held-out accuracy half way from the best single model to each other candidate."""
    best, *others = ranked(kitchen.pool.held_out)
    return {trial: kitchen.accuracy(kitchen.soup([best, trial]), "held_out") for trial in others}


def strangers(kitchen: Kitchen, barrier: float) -> dict[str, str]:
    """Why some candidates are left out: half way they have less than the mean of both ends by more than `barrier`, a fraction."""
    ends = kitchen.pool.held_out
    best, reasons = ranked(ends)[0], {}
    for trial, middle in midpoints(kitchen).items():
        mean = (ends[best].value + ends[trial].value) / 2
        if mean - middle.value > barrier:
            reasons[trial] = (
                f"It lies in another basin: half way to the best single model, {best}, held_out falls to {100 * middle.value:.1f} %, "
                f"{100 * (mean - middle.value):.1f} points below the mean of both; the request's `barrier` is {100 * barrier:g}."
            )
    return reasons
