"""A shipped soup made again from its report and its ingredients alone, as `souping` made it."""

from collections.abc import Mapping

from torch import Tensor

from stockpot.outcomes import SoupReport
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.interpolation import coefficients
from stockpot.soup.recipes.learned import mixture
from stockpot.soup.recipes.model_stock import model_stock
from stockpot.soup.recipes.weights import Weights

FROM_INIT = ("model_stock", "wise_ft")
"""Recipes that the init's weights are part of."""


def rebuild(report: SoupReport, files: Mapping[str, Weights], start: Weights | None) -> dict[str, Tensor]:
    """The state dict. files: of every ingredient, by its id. start: the init's weights, for the recipes in `FROM_INIT`."""
    if report.shares:
        return mixture([files[trial] for trial in report.ingredients], report.shares)
    chosen = [files[trial] for trial in sorted(report.ingredients)]
    if report.recipe == "model_stock":
        assert start
        return model_stock(start, chosen)
    if report.recipe == "wise_ft" and report.alpha != 1:
        assert start
        assert report.alpha is not None
        return average([start, *chosen], coefficients(len(chosen), report.alpha))
    return average(chosen)
