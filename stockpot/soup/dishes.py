"""The recipes that are more than a list of trials chosen one by one, as dishes: the pruned soup, Model Stock, and places on the line to the
init (WiSE-FT).
"""

from collections.abc import Sequence

from stockpot.config import Init, SoupSpec
from stockpot.soup.kitchen import Dish, Kitchen
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.interpolation import coefficients
from stockpot.soup.recipes.model_stock import model_stock
from stockpot.soup.recipes.pruned import pruned


def shipped(kitchen: Kitchen, init: Init, spec: SoupSpec, greedy: Sequence[str]) -> Dish:
    """The dish of a recipe that greedy and uniform are not. greedy: the members of that soup."""
    match spec.recipe:
        case "pruned":
            return prune(kitchen)
        case "model_stock":
            return stock(kitchen, init)
        case "wise_ft":
            return on_line(kitchen, init, greedy, spec.alpha)
        case _:
            return kitchen.learned(spec.mixing, by_layer=spec.recipe == "learned_by_layer")


def prune(kitchen: Kitchen) -> Dish:
    """The pruned soup."""
    stay = pruned(kitchen.pool.held_out, lambda trials: kitchen.accuracy(kitchen.soup(trials), "held_out"))
    return kitchen.soup(stay)


def stock(kitchen: Kitchen, init: Init) -> Dish:
    """Model Stock of the whole pool."""
    trials = tuple(sorted(kitchen.pool.candidates))
    chosen = [kitchen.pool.candidates[trial] for trial in trials]
    identity = ("model_stock", init.digest, *[one.ingredient.weights_sha256 for one in chosen])
    return Dish(identity, lambda: model_stock(kitchen.pool.start, [one.weights for one in chosen]), trials)


def on_line(kitchen: Kitchen, init: Init, trials: Sequence[str], alpha: float) -> Dish:
    """The soup of these trials on its line from the init (0) to itself (1)."""
    if alpha == 1:
        return kitchen.soup(trials)  # to the bit; a weighted sum with a zero in it is rounded otherwise
    chosen = [kitchen.pool.candidates[trial] for trial in sorted(trials)]
    shares = coefficients(len(trials), alpha)
    contents = [init.digest, *[one.ingredient.weights_sha256 for one in chosen]]
    identity = tuple(f"{share:.12g}*{content}" for share, content in zip(shares, contents, strict=True))
    return Dish(identity, lambda: average([kitchen.pool.start, *[one.weights for one in chosen]], shares), tuple(trials))
