"""The plain mean of ingredients that are in the ledger and not needed here afterwards, taken as they arrive: two of them are on the disk at
the most.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torch import Tensor

from stockpot.ledger import registry, tracking
from stockpot.outcomes import SoupReport
from stockpot.soup.borrowing import borrow_again
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


def sources(report: SoupReport) -> dict[str, Source]:
    """Where a soup's ingredients lie, as far as the ledger still has them. One listing, however many they are, but for borrowed ones."""
    known, champion = tracking.ingredients_of(report.model, report.init_digest, report.ingredients), report.champion
    found = {
        trial: Source(trial, known[trial].weights_sha256, partial(tracking.fetch_ingredient, known[trial]))
        for trial in report.ingredients
        if trial in known
    }
    if champion and champion.ingredient_id in report.ingredients and registry.find_soup(champion.model, champion.soup_sha256):
        fetch = partial(registry.fetch_soup, champion.model, champion.soup_sha256)
        found[champion.ingredient_id] = Source(champion.ingredient_id, champion.soup_sha256, fetch)
    for trial in report.borrowed.keys() & set(report.ingredients):
        if lent := tracking.find_ingredient(report.borrowed[trial].model, trial):
            found[trial] = Source(trial, report.borrowed[trial].weights_sha256, partial(borrow_again, lent, report))
    return found


def stored_mean(report: SoupReport, found: Mapping[str, Source], folder: Path) -> dict[str, Tensor]:
    """The weights of such a soup, BatchNorm statistics as averaged. found: all its ingredients, of `sources`. folder: room for two of them.

    Raises `IngredientMismatch` for a changed one.
    """
    sha256 = {trial: one.sha256 for trial, one in found.items()}
    return average_streamed(report.ingredients, sha256, lambda trial: found[trial].open(folder))
