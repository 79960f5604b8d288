"""The pruned soup (arXiv:2301.10092): start from all ingredients, visit each once from the worst to the best, and drop it when the soup
without it is not worse on held_out.
"""

from collections.abc import Callable, Mapping, Sequence

from stockpot.outcomes import Accuracy
from stockpot.soup.recipes.greedy import ranked


def pruned(held_out: Mapping[str, Accuracy], score: Callable[[Sequence[str]], Accuracy]) -> tuple[str, ...]:
    """Trial ids that stay, best first. `score` gives the held-out accuracy of a soup of these trials."""
    soup = ranked(held_out)
    best = score(soup)
    for trial in reversed(soup.copy()):
        rest = [other for other in soup if other != trial]
        if rest and (found := score(rest)).value >= best.value:
            soup, best = rest, found
    return tuple(soup)
