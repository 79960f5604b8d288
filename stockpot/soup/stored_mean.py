"""The plain mean of ingredients that are in the ledger and not needed here afterwards, taken as they arrive: two of them are on the disk at
the most.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torch import Tensor

from stockpot.errors import RegistryError
from stockpot.ledger import registry, tracking
from stockpot.outcomes import SoupReport
from stockpot.soup.rebuilding import FROM_INIT
from stockpot.soup.recipes.streaming import average_streamed
from stockpot.soup.recipes.weights import Weights, open_weights


class Source(NamedTuple):
    """An ingredient in the ledger."""

    trial: str
    sha256: str
    fetch: Callable[[Path], Path]
    """Puts its files into a folder and compares them with their digests; returns the folder of the weights."""

    def open(self, folder: Path) -> Weights:
        """Fetched and open, and without a name on the disk: closing it frees its room."""
        with TemporaryDirectory(dir=folder, prefix=f"{self.trial}-") as place:
            return open_weights(self.fetch(Path(place)) / "model.safetensors", self.sha256).held()


def is_plain_mean(report: SoupReport) -> bool:
    """Whether a soup is the mean of its ingredients and of nothing else, as greedy, uniform and pruned ones are."""
    return not report.shares and report.recipe not in FROM_INIT


def stored_mean(report: SoupReport, folder: Path) -> dict[str, Tensor]:
    """The weights of such a soup, BatchNorm statistics as averaged. folder: room for two ingredients.

    Raises `RegistryError` for an ingredient that is gone, `IngredientMismatch` for a changed one.
    """
    sources = {trial: source(report, trial) for trial in report.ingredients}
    return average_streamed(
        report.ingredients, {trial: source.sha256 for trial, source in sources.items()}, lambda trial: sources[trial].open(folder)
    )


def source(report: SoupReport, trial: str) -> Source:
    """Where one of a soup's ingredients lies. Raises `RegistryError` for one that is gone."""
    champion = report.champion
    if champion and trial == champion.ingredient_id:
        return Source(trial, champion.soup_sha256, partial(registry.fetch_soup, champion.model, champion.soup_sha256))
    ingredient = tracking.find_ingredient(report.model, trial)
    if ingredient is None:
        raise RegistryError(f"Ingredient {trial} of {report.model} is no longer in the ledger; it may have been pruned.")
    return Source(trial, ingredient.weights_sha256, partial(tracking.fetch_ingredient, ingredient))
